"""A tiny UIE-M: the tiny checkpoint with the heads of the goldens, and with the mask that UIE-M was trained with."""

import math

import torch

from erniem_fast import ErnieMForInformationExtraction, ErnieMTokenizer
from tests.golden.cases import TINY

ROW = 512


class Padded(ErnieMForInformationExtraction):
    """Computes rows as if they were padded to 512 tokens, with [CLS] hidden from all and the padding shown.

    Padding is one token, whose weight as a key is that of all of them.
    """

    def forward(self, input_ids, attention_mask):
        lengths = attention_mask.sum(1)
        rows, columns = input_ids.shape
        ids = torch.cat([input_ids, torch.full((rows, 1), 1)], 1)[:, :ROW]
        place = torch.arange(ids.shape[1]).expand(rows, -1)
        bias = torch.zeros(ids.shape)
        bias[place > lengths[:, None]] = -math.inf
        padded = lengths < ids.shape[1]
        bias[padded, lengths[padded]] = (ROW - lengths[padded]).log()
        bias[ids == 0] = -math.inf
        positions = place.masked_fill(place >= lengths[:, None], 0)
        output = super().forward(
            ids,
            attention_mask=bias[:, None, None, :].expand(-1, 1, ids.shape[1], -1).contiguous(),
            position_ids=positions,
        )
        output.start_logits, output.end_logits = output.start_logits[:, :columns], output.end_logits[:, :columns]
        return output


def load_padded(heads):
    model = Padded.from_pretrained(TINY).eval()
    with torch.no_grad():
        for name, values in heads.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.tensor(values).view_as(parameter))
    return model


def load_tokenizer():
    return ErnieMTokenizer.from_pretrained(TINY)
