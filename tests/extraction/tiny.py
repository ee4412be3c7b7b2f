"""A tiny UIE-M: the tiny checkpoint with the heads of the goldens, and with the mask that UIE-M was trained with."""

import torch

from erniem_fast import ErnieMForInformationExtraction, ErnieMTokenizer
from tests.golden.cases import TINY


def load_padded(heads):
    model = ErnieMForInformationExtraction.from_pretrained(TINY, uie_padded_length=512).eval()
    with torch.no_grad():
        for name, values in heads.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.tensor(values).view_as(parameter))
    return model


def load_tokenizer():
    return ErnieMTokenizer.from_pretrained(TINY)
