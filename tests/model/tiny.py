"""The tiny checkpoint, inputs of every layout of padding, and how results of two models are compared."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening

from erniem_fast import (
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
)
from tests.golden import cases

PAD, HEADS, HIDDEN = cases.PAD, 2, cases.HIDDEN

# One row each of: no padding, right padding, left padding, holes, one token at the end, no token at all.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
EMPTY = 5
ROWS, COLUMNS = MASK.shape
REAL = MASK.bool()
RIGHT = (torch.arange(COLUMNS) < torch.tensor([[11], [7], [4], [1]])).long()

# The layouts sum in another order: of values about 1, a hundred roundings of 1.2e-7.
ATOL = 1e-5


def make_ids(mask=MASK):
    ids = torch.randint(4, cases.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(mask == 0, PAD)


IDS = make_ids()


def load(model_class=ErnieMModel, dropout=0.0, **config):
    """The tiny checkpoint; heads get weights of their own, the same every time."""
    torch.manual_seed(7)
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "act_dropout"), dropout)
    return model_class.from_pretrained(cases.TINY, **rates, classifier_dropout=0.0, **config).eval()


def set_packing(monkeypatch, packed):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "1" if packed else "0")


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_gradients(actual, expected, rtol=1e-5):
    """Of the model's largest gradient, so that one that cancels to zero is measured by something."""
    assert actual.keys() == expected.keys()
    scale = max(grad.abs().max() for grad in expected.values())
    for name in expected:
        error = (actual[name] - expected[name]).abs().max()
        assert error <= rtol * scale, f"gradient of {name} is off by {error / scale:.1e} of the largest"


def random_weights(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


class Calls(TorchDispatchMode):
    """Notes which operators run, and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        self.names.add(function.name())
        self.shapes |= {tuple(each.shape) for each in tree_leaves(results) if isinstance(each, torch.Tensor)}
        return results


def logits_of(outputs):
    """What a head computes, with a dimension of columns where it has one; an encoder's states and pooled output."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return {name: outputs[name] for name in names if name in outputs}


LAYOUT_CASES = {
    "model": (ErnieMModel, {}),
    "sequence": (ErnieMForSequenceClassification, {"num_labels": 3}),
    "choice": (ErnieMForMultipleChoice, {}),
    "token": (ErnieMForTokenClassification, {"num_labels": 5}),
    "span": (ErnieMForQuestionAnswering, {}),
    "extraction": (ErnieMForInformationExtraction, {}),
}


def flattened(mask, labels=None):
    """The rows of a right-padded batch as the collator packs them."""
    rows = [row[kept.bool()].tolist() for row, kept in zip(make_ids(mask), mask, strict=True)]
    features = [{"input_ids": row} for row in rows]
    for index, feature in enumerate(features if labels is not None else []):
        feature["labels"] = labels[index, : len(rows[index])].tolist()
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    if labels is None:
        del batch["labels"]  # the collator makes some up
    return batch


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
