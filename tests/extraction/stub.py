"""A model that finds what a test tells it to, for tests of all that is around a model."""

from types import SimpleNamespace

import torch
from torch import nn


class Stub(nn.Module):
    """Scores the tokens of a prompt's answers as starts and ends.

    Args:
        tokenizer: what the rows were made with.
        answers: from each prompt to what is found for it in a text (or in the prompt), by its text; or a function from
            the ids of a prompt and a text to the numbers of starts and of ends in the row.
    """

    def __init__(self, tokenizer, answers, score=4.0):
        super().__init__()
        self.config, self.device = SimpleNamespace(max_position_embeddings=514), torch.device("cpu")
        self.tokenizer, self.score, self.calls = tokenizer, score, []
        self.answers = answers

    def forward(self, input_ids, attention_mask):
        self.calls.append([row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)])
        logits = torch.full((2, *input_ids.shape), -8.0)
        for index, row in enumerate(self.calls[-1]):
            for side, places in enumerate(self._find(row)):
                logits[side, index, places] = self.score
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])

    def _find(self, row):
        sep = self.tokenizer.sep_token_id
        prompt = row[1 : row.index(sep, 1)]
        if callable(self.answers):
            return self.answers(prompt, row)
        starts, ends = [], []
        for wanted in self._wanted(prompt):
            ids = self._ids(wanted)
            for start in range(len(row) - len(ids) + 1):
                if row[start : start + len(ids)] == ids:
                    starts.append(start)
                    ends.append(start + len(ids) - 1)
        return starts, ends

    def _wanted(self, prompt):
        return [wanted for name, found in self.answers.items() if self._ids(name) == prompt for wanted in found]

    def _ids(self, text):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class Letters:
    """A tokenizer whose tokens are characters, all known, so that a test can tell where they stand."""

    cls_token_id, pad_token_id, sep_token_id, unk_token_id = 0, 1, 2, None

    def convert_tokens_to_ids(self, token):
        return ord(token) + 3

    def __call__(self, texts, **options):
        if isinstance(texts, str):
            return {name: values[0] for name, values in self([texts]).items()}
        places = [[index for index, letter in enumerate(text) if not letter.isspace()] for text in texts]
        return {
            "input_ids": [[ord(text[i]) + 3 for i in mine] for text, mine in zip(texts, places, strict=True)],
            "offset_mapping": [[(i, i + 1) for i in mine] for mine in places],
        }
