"""CUDA graphs by bucket, as far as they go without a GPU: a forward runs again where a graph would be replayed."""

import contextlib
import copy
import io
import pickle
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from erniem_fast import (
    ErnieMConfig,
    ErnieMForSequenceClassification,
    ErnieMModel,
    graphs,
    use_graphs,
    use_kernels,
)
from erniem_fast.graphs import Bucket, Graphs
from tests.batches import sequences
from tests.model.tiny import Calls
from tests.reruns import Reruns

MOST = 64
# Buckets sum in another order: of values about 1, a thousand roundings of 2.2e-16.
ATOL = 1e-12


@pytest.fixture(autouse=True)
def none_made(monkeypatch):
    monkeypatch.setattr(Reruns, "made", 0)


def make_model(kind=ErnieMModel):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    model = kind(ErnieMConfig(vocab_size=50, **sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    encoder = model.base_model
    encoder._graphs = Graphs(encoder, MOST, Reruns)
    return model


def batch_of(*lengths, seed=0):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


def without_graphs(model, **inputs):
    """What the model returns without graphs."""
    encoder = model.base_model
    own, encoder._graphs = encoder._graphs, None
    try:
        return model(**inputs)
    finally:
        encoder._graphs = own


def captures(model):
    own = model.base_model._graphs
    return own._recorder.captures if Reruns.made else 0


@torch.inference_mode()
def assert_same(model, **inputs):
    actual, expected = model(**inputs), without_graphs(model, **inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=ATOL)


PACKED = {
    "input_ids": torch.arange(3, 15)[None],
    "position_ids": torch.tensor([[*range(5), *range(7)]]),
    "cu_seq_lens_q": torch.tensor([0, 5, 12]),
    "max_length_q": 7,
}
INPUTS = {
    "one sentence": batch_of(9),
    "a whole bucket": batch_of(16),
    "one token": batch_of(1),
    "ragged": batch_of(5, 9, 2),
    "rows without padding": batch_of(7, 7),
    "a row of padding": {**batch_of(5, 9, 2), "attention_mask": torch.tensor([[1] * 5 + [0] * 4, [0] * 9, [1] * 9])},
    "holes": {**batch_of(6, 6), "attention_mask": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])},
    "positions": {**batch_of(6, 4), "position_ids": torch.arange(6).flip(0)[None]},
    "packed": PACKED,
    "most tokens": batch_of(40, 24),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.usefixtures("packed")
def test_results_are_those_without_graphs(name):
    assert_same(make_model(), **INPUTS[name])


@pytest.mark.parametrize("name", ["one sentence", "ragged", "holes", "packed"])
def test_a_graph_serves_them(name):
    model = make_model()
    assert_same(model, **INPUTS[name])
    assert captures(model) == 1


def test_a_head_is_served_too():
    model = make_model(ErnieMForSequenceClassification)
    assert_same(model, **INPUTS["ragged"])
    assert captures(model) == 1


@pytest.mark.parametrize(("many", "few"), [([9, 6], [3, 5]), ([7, 7], [4, 4])], ids=["ragged", "no padding"])
@torch.inference_mode()
def test_a_bucket_is_captured_once_and_no_result_changes_later(many, few):
    """The second call has fewer tokens, so that those of the first remain behind them."""
    model = make_model()
    many, few = batch_of(*many), batch_of(*few, seed=1)
    first = model(**many)
    kept = {name: value.clone() for name, value in first.items()}
    assert_same(model, **few)
    assert captures(model) == 1
    for name, value in first.items():
        assert torch.equal(value, kept[name])


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([1], (16, 1, 64)),
        ([16], (16, 1, 64)),
        ([17], (32, 1, 64)),
        ([9, 0, 3], (16, 4, 64)),
        ([64, 1], (128, 2, 64)),
        ([65, 64], (256, 2, 128)),
        ([512], (512, 1, 512)),
        ([512, 1], (576, 2, 512)),
        ([512] * 2, (1024, 2, 512)),
        ([512] * 20 + [1], (11264, 32, 512)),
    ],
)
def test_sizes_are_rounded_up(lengths, bucket):
    assert Bucket.of(sequences(*lengths)) == bucket


@torch.inference_mode()
def test_every_filling_of_a_bucket(monkeypatch):
    """The tokens that fill it up need more than one sequence where the bucket's are short."""
    monkeypatch.setattr(graphs, "_LEAST_LENGTH", 4)
    model = make_model()
    for lengths in ([3, 2, 4, 4, 4], [4] * 8, [1] * 9, [4, 0, 4, 4, 4, 1]):
        assert_same(model, **batch_of(*lengths))
    assert {key[0].max_seqlen for key in model._graphs._graphs} == {4}


NOT_SERVED = {
    "more tokens": batch_of(40, 25),
    "hidden states": {**batch_of(5, 3), "output_hidden_states": True},
    "attentions": {**batch_of(5, 3), "output_attentions": True},
    "a head mask": {**batch_of(5, 3), "head_mask": torch.tensor([1.0, 0.5])},
    "a mask per query": {"input_ids": batch_of(5, 5)["input_ids"], "attention_mask": torch.ones(2, 5, 5).tril()},
    "embeddings": {"inputs_embeds": torch.ones(1, 5, 16, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_other_calls_run_as_without_graphs(name):
    model = make_model()
    assert_same(model, **NOT_SERVED[name])
    assert captures(model) == 0


def test_gradients_and_dropout_run_as_without_graphs():
    model, inputs = make_model(), batch_of(5, 3)
    assert model(**inputs).last_hidden_state.requires_grad
    model.train()
    with torch.no_grad():
        first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    assert captures(model) == 0


@torch.no_grad()
def test_autocast_and_verification_run_as_without_graphs(monkeypatch):
    model = make_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch_of(5, 3))
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
    model(**batch_of(5, 3))
    assert captures(model) == 0


def own_forward(module):
    module.forward = module.forward  # as accelerate sets one that moves weights first
    return contextlib.closing(types.SimpleNamespace(close=lambda: delattr(module, "forward")))


HOOKS = {
    "a hook": lambda module: module.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "a global hook": lambda _: register_module_forward_hook(lambda *_: None),
    "a forward of its own": own_forward,
}


@pytest.mark.parametrize("name", HOOKS)
@torch.no_grad()
def test_no_graph_leaves_out_hooks(name):
    model, inputs = make_model(), batch_of(5, 3)
    model(**inputs)
    recorder = model._graphs._recorder
    with HOOKS[name](model.encoder.layers[1]):
        model(**inputs)
    assert recorder.replays == 1
    model(**inputs)
    assert (recorder.replays, Reruns.made) == (2, 1)


CHANGES = {
    "in place": (lambda model: model.encoder.layers[0].linear1.weight.mul_(2.0), 1),
    "a state dict": (lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}), 1),
    "other memory": (lambda model: setattr(model.encoder.layers[0].norm1.bias, "data", torch.ones(16).double()), 2),
    "another parameter": (lambda model: setattr(model.pooler.dense, "bias", nn.Parameter(torch.ones(16).double())), 2),
    "another module": (lambda model: setattr(model.encoder.layers[1], "activation", nn.Tanh().eval()), 2),
    "fewer heads": (lambda model: model.prune_heads({1: [0]}), 2),
    "another dtype": (lambda model: model.float(), 2),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_of_the_model_are_seen(name, monkeypatch):
    change, recorders = CHANGES[name]
    model, inputs = make_model(), batch_of(5, 3)
    before = model(**inputs)
    change(model)
    monkeypatch.setattr("tests.model.test_graphs.ATOL", 1e-5 if name == "another dtype" else ATOL)
    assert_same(model, **inputs)
    assert not torch.equal(model(**inputs).pooler_output.double(), before.pooler_output)
    assert Reruns.made == recorders


@torch.no_grad()
def test_other_implementations_have_graphs_of_their_own():
    model = make_model()
    assert_same(model, **batch_of(5, 3))
    for _ in range(2):
        with use_kernels(attention="reference"), Calls() as calls:
            model(**batch_of(5, 3))
        assert "aten::scaled_dot_product_attention" not in calls.names
        assert captures(model) == 2


def test_copies_have_no_graphs():
    model = make_model()
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(written, weights_only=False)):
        assert other._graphs is None
        with torch.no_grad():
            other(**batch_of(5, 3))
    replica = copy.copy(model)  # as DataParallel makes them: the attributes are the same objects
    with torch.no_grad():
        replica(**batch_of(5, 3))
    assert Reruns.made == 0


def test_threads_take_turns():
    model = make_model()
    inputs = [batch_of(9, 4, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [without_graphs(model, **each).last_hidden_state for each in inputs]
    errors = []

    def call(index):
        with torch.no_grad():
            for _ in range(25):
                errors.append((model(**inputs[index]).last_hidden_state - expected[index]).abs().max().item())

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 100
    assert max(errors) <= ATOL
    assert captures(model) == 1


def test_a_forward_that_cannot_be_captured_is_told_with_the_remedy():
    model = make_model()

    class Fails(Reruns):
        def capture(self, forward):
            raise RuntimeError("operation not permitted when stream is capturing")

    model._graphs = Graphs(model, MOST, Fails)
    message = (
        r"a forward of Bucket\(tokens=16, .*permitted when stream is capturing\n`use_graphs\(model, most_tokens=0\)`"
    )
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        model(**batch_of(5, 3))


def test_what_cannot_have_graphs_is_refused_by_name():
    with pytest.raises(ValueError, match="model is of type Linear, which contains no ErnieMModel"):
        use_graphs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="most_tokens is -1"):
        use_graphs(make_model(), most_tokens=-1)
    with pytest.raises(ValueError, match="model is on device cpu, but CUDA graphs need a GPU"):
        use_graphs(make_model(ErnieMForSequenceClassification))


def test_graphs_can_be_given_up():
    model = make_model(ErnieMForSequenceClassification)
    use_graphs(nn.Sequential(model), most_tokens=0)
    assert model.ernie_m._graphs is None
