"""A head that the checkpoint did not hold is told, until it is trained."""

import copy
import warnings

import pytest
import torch

from erniem_fast import ErnieMForInformationExtraction, ErnieMForQuestionAnswering, extract, extract_answer, optimize
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

TEXT = "Your password was changed."


@pytest.mark.parametrize(
    ("kind", "names", "remedy"),
    [
        (ErnieMForInformationExtraction, "linear_start.weight and linear_end.weight", "finetune_extraction.py"),
        (ErnieMForQuestionAnswering, "qa_outputs.weight", "finetune_qa.py"),
    ],
)
def test_a_head_is_told_until_it_is_trained(tmp_path, kind, names, remedy):
    tokenizer, model = load_tokenizer(), kind.from_pretrained(TINY)

    def use(model):
        if kind is ErnieMForInformationExtraction:
            return extract(model, tokenizer, TEXT, "user", lang="en")
        return extract_answer(model, tokenizer, "Who?", TEXT)

    rounded = optimize(copy.deepcopy(model).eval(), weights="int8")
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16(), rounded):
        with pytest.warns(UserWarning, match=rf"means nothing: {names} of the model are random.*{remedy}"):
            use(each)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (model, loaded, kind(model.config)):
            use(each)


@pytest.mark.parametrize("kind", [ErnieMForInformationExtraction, ErnieMForQuestionAnswering])
def test_a_model_without_values_tells_nothing(kind):
    """As where accelerate has offloaded its weights."""
    assert kind.from_pretrained(TINY, device_map="meta").untrained_weights() == []
    model = kind.from_pretrained(TINY)
    assert model.untrained_weights()
    assert model.to("meta").untrained_weights() == []
