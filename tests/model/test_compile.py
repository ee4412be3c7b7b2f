"""torch.compile, and the whole model by every implementation of every op."""

import pytest
import torch

from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification, ErnieMModel, flags
from tests.golden import cases
from tests.model.tiny import (
    COLUMNS,
    IDS,
    MASK,
    REAL,
    assert_close,
    assert_same_gradients,
    gradients,
    load,
    logits_of,
    random_weights,
)


@pytest.fixture
def compiler():
    """torch._dynamo's counters, from zero."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


def assert_compiled_equals_eager(compiled, model, batch):
    found = []
    for each in (compiled, model):
        model.zero_grad()
        torch.manual_seed(3)
        values = logits_of(each(**batch))
        sum((value * random_weights(value)).sum() for value in values.values()).backward()
        found.append((values, gradients(model)))
    for name, value in found[1][0].items():
        assert_close(found[0][0][name], value)
    assert_same_gradients(found[0][1], found[1][1])


def packed_batches(counts):
    generator = torch.Generator().manual_seed(2)
    for tokens in counts:
        bounds = torch.tensor([0, tokens // 3, tokens // 2, tokens], dtype=torch.int32)
        ids = torch.randint(4, cases.VOCABULARY, (1, tokens), generator=generator)
        yield {"input_ids": ids, "cu_seq_lens_q": bounds, "max_length_q": tokens - tokens // 2}


@pytest.mark.parametrize(
    ("model_class", "dropout", "dynamic", "graphs"),
    [(ErnieMModel, 0.3, None, 2), (ErnieMForTokenClassification, 0.0, True, 1)],
    ids=["model", "head"],
)
def test_one_graph_for_packed_input_of_any_size(model_class, dropout, dynamic, graphs, compiler):
    """Without breaks, forward and backward; with automatic dynamic shapes after a first one for a first size."""
    model = load(model_class, dropout=dropout).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in packed_batches([12, 19, 30, 31, 64]):
        assert_compiled_equals_eager(compiled, model, batch)
    assert compiler["stats"]["unique_graphs"] == graphs
    assert not compiler["graph_break"]


@pytest.mark.parametrize("model_class", [ErnieMForTokenClassification, ErnieMForSequenceClassification])
def test_a_loss_inside_the_graph(model_class, compiler):
    # Where it is None the first loss sets the problem type, and the second would need another graph.
    model = load(model_class, num_labels=3, problem_type="single_label_classification").train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in packed_batches([12, 19]):
        found = []
        labels = batch["input_ids"] % 3 if model_class is ErnieMForTokenClassification else torch.tensor([2, 0, -100])
        for each in (compiled, model):
            model.zero_grad()
            loss = each(**batch, labels=labels).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        assert_close(found[0][0], found[1][0])
        assert_same_gradients(found[0][1], found[1][1])
    assert compiler["stats"]["unique_graphs"] == 1


def test_a_compiled_model_on_padded_input(packed, compiler):
    """With breaks around what only the host can know."""
    model = load()
    compiled = torch.compile(model, backend="aot_eager")
    for columns in (COLUMNS, 7):
        ids, mask = IDS[:, :columns], MASK[:, :columns]
        hidden, expected = (each(ids, attention_mask=mask).last_hidden_state for each in (compiled, model))
        assert_close(hidden[mask.bool()], expected[mask.bool()])


def test_a_model_compiled_by_inductor(compiler, tmp_path, monkeypatch):
    # Inductor's own cache would give code for another CPU capability, which it does not tell apart (seen in 2.13).
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = load()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in packed_batches([12, 19, 30]):
        assert_compiled_equals_eager(compiled, model, batch)
    assert compiler["stats"]["unique_graphs"] == 1


def test_every_implementation_of_every_op_agrees(model, packed, monkeypatch):
    """The whole model by the reference, and each op verified beside it."""
    found = []
    for implementation in ("reference", "torch", "auto"):
        if implementation == "auto":
            monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
        ops = dict.fromkeys(flags.OPS, implementation)
        model.zero_grad()
        with flags.use_implementations(**ops):
            hidden = model(IDS, attention_mask=MASK).last_hidden_state
            hidden[REAL].square().sum().backward()
        found.append((hidden[REAL], gradients(model)))
    for hidden, grads in found[1:]:
        assert_close(hidden, found[0][0])
        assert_same_gradients(grads, found[0][1])
