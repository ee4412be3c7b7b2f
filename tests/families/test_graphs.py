"""CUDA graphs of transformers' models, as far as they go without a GPU: a forward runs again where one is replayed."""

import pytest
import torch
import transformers

import erniem_fast
from erniem_fast.graphs import Graphs
from tests.families.tiny import COLUMNS, FAMILIES, IDS, TYPES, both, make
from tests.reruns import Reruns

LENGTHS = torch.tensor([11, 7, 1, 4])
MASK = (torch.arange(COLUMNS) < LENGTHS[:, None]).long()
INPUTS = {"input_ids": IDS[:4].clamp(min=4).where(MASK.bool(), 1), "attention_mask": MASK}


@torch.inference_mode()
def results(model, **inputs):
    return model(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_without_graphs(family, monkeypatch):
    monkeypatch.setattr(Reruns, "made", 0)
    fast = both(family)[1].double()
    typed = {**INPUTS, "token_type_ids": TYPES[:4]} if family == "bert" else INPUTS
    packed = {"input_ids": IDS[:1].clamp(min=4), "cu_seq_lens_q": torch.tensor([0, 4, 11]), "max_length_q": 7}
    calls = [typed, INPUTS, packed, {"input_ids": IDS[:1, :3]}]
    expected = [results(fast, **each) for each in calls]
    fast._graphs = Graphs(fast, 64, Reruns)
    for inputs, wanted in zip(calls, expected, strict=True):
        for name, value in results(fast, **inputs).items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-12)
    assert fast._graphs._recorder.captures == 3  # the second call's bucket is the first's
    erniem_fast.restore(fast)
    assert "_graphs" not in vars(fast)


def test_other_calls_run_as_without_graphs():
    """Embeddings, hidden states, padding in a first column, gradients."""
    fast = both()[1]
    fast._graphs = Graphs(fast, 64, Reruns)
    left = {"input_ids": IDS[:4], "attention_mask": MASK.flip(1)}
    for inputs in ({"inputs_embeds": torch.zeros(1, 3, 32)}, {**INPUTS, "output_hidden_states": True}, left):
        results(fast, **inputs)
    fast(**INPUTS)
    assert not fast._graphs._graphs


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"contains no ErnieMModel; .*call erniem_fast\.optimize\(model\) first"):
        erniem_fast.use_graphs(make())
    head = erniem_fast.optimize(make("bert", transformers.BertForSequenceClassification))
    with pytest.raises(ValueError, match="is on device cpu, but CUDA graphs need a GPU"):
        erniem_fast.use_graphs(head)
