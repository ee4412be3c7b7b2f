"""Situations of labels and losses."""

import pytest
import torch
from torch import nn

from erniem_fast import ErnieMForQuestionAnswering, ErnieMForSequenceClassification, ErnieMForTokenClassification
from tests.model.tiny import assert_close, load, relative_error
from tests.situations.truths import BATCH, HEADS_AND_LABELS, IDS, MASK, SEVERAL, batch_for

INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("head", HEADS_AND_LABELS)
def test_labels_of_any_integers(head):
    """As NumPy makes them on some systems, or as they are packed to save memory; at padding they become -100."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    model = load(model_class, **config)
    expected = model(**batch_for(model), **labels).loss
    for dtype in INTEGERS:
        given = {name: values.to(dtype) for name, values in labels.items()}
        if all(torch.equal(given[name].to(values.dtype), values) for name, values in labels.items()):
            model = load(model_class, **config)  # the first labels decide what kind of problem it is
            assert_close(model(**batch_for(model), **given).loss, expected)


def test_several_classes_at_once_by_the_config():
    """Or by the labels' shape, where there is a place for every class."""
    expected = nn.functional.binary_cross_entropy_with_logits
    for problem_type in (None, "multi_label_classification"):
        model = load(ErnieMForSequenceClassification, num_labels=3, problem_type=problem_type)
        for labels in (SEVERAL, SEVERAL.long(), SEVERAL.bool()):
            outputs = model(**BATCH, labels=labels)
            assert_close(outputs.loss, expected(outputs.logits, SEVERAL))
        assert model.config.problem_type == "multi_label_classification"


def test_classes_that_are_no_integers_are_refused_by_name():
    for model_class, labels, name in (
        (ErnieMForTokenClassification, {"labels": (IDS % 2).float()}, "labels"),
        (
            ErnieMForQuestionAnswering,
            {"start_positions": MASK[:, 0] / 2, "end_positions": MASK[:, 0]},
            "start_positions",
        ),
    ):
        with pytest.raises(ValueError, match=rf"{name} has dtype torch\.float32; it must hold integers: .*\.long\(\)"):
            load(model_class)(**BATCH, **labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS_AND_LABELS)
def test_losses_in_other_dtypes(head, dtype):
    """Labels stay in float32: loss and gradient are right beside logits of any dtype."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    found = []
    for each in (dtype, torch.float32):
        model = load(model_class, **config).to(each)
        loss = model(**batch_for(model), **labels).loss
        loss.backward()
        found.append((loss, model.get_input_embeddings().weight.grad))
    # As half precision is bound in tests/model/test_dtypes.py; in float64 the float32 beside it rounds.
    eps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert relative_error(found[0][0], found[1][0]) < 4 * eps
    assert found[0][1].dtype == dtype
    assert relative_error(found[0][1], found[1][1]) < 16 * eps


def test_labels_of_the_wrong_shape_are_refused_and_leave_no_guess_behind():
    """transformers keeps what it takes labels for before the loss fails, so that right labels fail afterwards."""
    model = load(ErnieMForSequenceClassification, num_labels=2)
    rows = len(BATCH["input_ids"])
    right = torch.zeros(rows, dtype=torch.int64)
    for labels, message in (
        (right.float(), rf"labels has dtype torch.float32 and shape \({rows},\); .* or integers of shape \({rows},\)"),
        (torch.zeros(rows, 3), rf"shape \({rows}, 3\); with num_labels=2 .* must hold numbers of shape \({rows}, 2\)"),
        (right[1:], rf"labels has shape \({rows - 1},\); it must be \({rows},\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**BATCH, labels=labels)
        assert model.config.problem_type is None
    assert_close(model(**BATCH, labels=right).loss, nn.functional.cross_entropy(model(**BATCH).logits, right))


@pytest.mark.parametrize("head", HEADS_AND_LABELS)
def test_labels_that_are_no_tensors_or_too_many_are_refused_by_name(head):
    model_class, config, labels = HEADS_AND_LABELS[head]
    model = load(model_class, **config)
    name, given = next(iter(labels.items()))
    for wrong, message in (
        (given.tolist(), "is of type list, but must be a tensor"),
        (torch.cat([given, given]), r"has (dtype .* and )?shape"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            model(**batch_for(model), **labels | {name: wrong})
