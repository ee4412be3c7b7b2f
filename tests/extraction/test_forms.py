"""A UIE-M that has learnt a word finds it in every form that a model can have: rounded, compiled, or trained anew."""

import copy

import pytest
import torch

from erniem_fast import ErnieMForInformationExtraction, extract, optimize, use_graphs
from erniem_fast.extraction import Answer, Example, ExtractionCollator, make_features
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

TEXTS = [
    "Your password was changed.",
    "Log in again, please.",
    "The password and the user's password are the same.",
    "Enter the new password twice so we can verify it.",
    "This field is required.",
]


def examples():
    for text in TEXTS:
        starts = [start for start in range(len(text)) if text.startswith("password", start)]
        yield Example(text, "user", tuple(Answer("password", start, start + 8) for start in starts))


def train(tokenizer, steps, checkpointing=False):
    """The model, and the loss of each step."""
    torch.manual_seed(0)
    model = ErnieMForInformationExtraction.from_pretrained(TINY, uie_padded_length=512).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = ExtractionCollator(tokenizer)(make_features(tokenizer, list(examples())))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def trained(tokenizer):
    return train(tokenizer, 60)[0]


def spans(model, tokenizer):
    results = extract(model, tokenizer, TEXTS, "user", lang="en")
    return [[(span["start"], span["end"]) for span in found.get("user", [])] for found in results]


def expected():
    return [[answer[1:] for answer in example.result_list] for example in examples()]


def test_it_has_learnt(trained, tokenizer):
    assert spans(trained, tokenizer) == expected()


@pytest.mark.parametrize("weights", ["packed", "bfloat16", "int8"])
def test_rounded_weights_find_the_same(trained, tokenizer, weights):
    assert spans(optimize(copy.deepcopy(trained), weights=weights), tokenizer) == expected()


def test_a_compiled_model_finds_the_same(trained, tokenizer):
    torch.compiler.reset()
    compiled = torch.compile(trained, backend="eager")
    assert spans(compiled, tokenizer) == expected()
    torch.compiler.reset()


def test_cuda_graphs_are_refused_without_a_gpu(trained):
    with pytest.raises(ValueError, match="model is on device cpu, but CUDA graphs need a GPU; move it there first"):
        use_graphs(trained)


def test_checkpoints_train_the_same(tokenizer):
    losses = [train(tokenizer, 4, checkpointing)[1] for checkpointing in (False, True)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
