"""A layout that is made on the host and moved equals one that is made in place; `test_gpu.py` compares them on GPUs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from erniem_fast import host_layout, inputs
from erniem_fast.families import layout
from tests.families import tiny
from tests.model.test_graphs import INPUTS, make_model

CPU = torch.device("cpu")


def tensors_of(value, name=""):
    """All tensors of a layout by their places."""
    if isinstance(value, Tensor):
        return {name: value}
    parts = value._asdict() if hasattr(value, "_asdict") else getattr(value, "__dict__", {})
    return {place: each for key, part in parts.items() for place, each in tensors_of(part, f"{name}.{key}").items()}


def others_of(value):
    """All numbers of a layout."""
    sequences = value.batch.sequences
    return value.batch.grid, value.batch.fills_grid, sequences.max_seqlen, sequences.contiguous


def assert_same(moved, own):
    tensors = tensors_of(moved)
    assert tensors.keys() == tensors_of(own).keys()
    assert others_of(moved) == others_of(own)
    for name, tensor in tensors_of(own).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture
def moves(monkeypatch):
    """Has the next layout made as for a GPU, though it stays here; the list of what was moved."""
    moved, move = [], host_layout.to_device

    def to_device(value, device):
        moved.append(value)
        return move(value, device)

    left = iter([True])
    monkeypatch.setattr(host_layout, "serves", lambda *_: next(left, False))
    monkeypatch.setattr(host_layout, "to_device", to_device)
    return moved


def prepare(name, padded_length=None):
    model = make_model()
    model.config.uie_padded_length = padded_length
    given = INPUTS[name]
    return inputs.prepare(
        model.config,
        given["input_ids"],
        None,
        given.get("attention_mask"),
        given.get("position_ids"),
        given.get("cu_seq_lens_q"),
        given.get("max_length_q"),
        needs_first=True,
        vocabulary=50,
        key_ranges=given.get("key_ranges"),
    )


RANGED = {**INPUTS["packed"], "key_ranges": torch.tensor([[0, 3], [1, 2]] * 6)}


@pytest.mark.parametrize("name", [*INPUTS, "ranged"])
def test_of_ernie_m(name, moves, monkeypatch):
    monkeypatch.setitem(INPUTS, "ranged", RANGED)
    moved = prepare(name)
    assert len(moves) == 1
    assert_same(moved, prepare(name))


def test_with_attended_padding(moves):
    """Whose key biases are floating-point numbers."""
    moved = prepare("ragged", padded_length=32)
    assert moved.batch.sequences.key_bias.dtype == torch.float32
    assert len(moves) == 1
    assert_same(moved, prepare("ragged", padded_length=32))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["masked", "left", "typed", "positions", "packed", "restarts", "whole"])
def test_of_other_families(family, kind, moves):
    _, model = tiny.both(family)
    mask, bounds, longest, types, positions = None, None, None, None, None
    ids = tiny.IDS[:3].clamp(min=4)
    if kind in ("masked", "left"):
        mask = tiny.ATTENTION_MASK[:3] if kind == "masked" else tiny.ATTENTION_MASK[:3].flip(1)
    elif kind == "typed":
        types = torch.zeros_like(ids) if family != "bert" else tiny.TYPES[:3]
    elif kind == "positions":
        positions = torch.arange(ids.shape[1]).flip(0)[None]
    elif kind != "whole":
        ids, positions = ids[:1, :11], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
        if kind == "packed":
            bounds, longest = torch.tensor([0, 4, 11]), 7
    arguments = (model, ids, None, mask, positions, types, bounds, longest)
    moved = layout.lay_out(*arguments)
    assert len(moves) == 1
    assert_same(moved, layout.lay_out(*arguments))


def test_tensors_share_memory_and_start_at_multiples_of_16_bytes():
    own = prepare("holes")
    moved = tensors_of(host_layout.to_device(own, CPU))
    memory = moved[".positions"].untyped_storage()
    assert all(each.untyped_storage().data_ptr() == memory.data_ptr() for each in moved.values())
    assert all(each.data_ptr() % 16 == 0 for each in moved.values())
    assert moved[".positions"] is moved[".batch.columns"]  # as in the layout: it is not copied twice
    assert memory.data_ptr() not in {each.untyped_storage().data_ptr() for each in tensors_of(own).values()}


def test_another_default_device():
    """Memory on the host is asked for by name."""
    own = prepare("ragged")
    torch.set_default_device("meta")
    try:
        moved = host_layout.to_device(own, CPU)
    finally:
        torch.set_default_device(None)
    assert_same(moved, own)


def test_a_layout_without_tokens():
    nothing = {"input_ids": torch.zeros(0, 5, dtype=torch.int64)}
    own = inputs.prepare(make_model().config, nothing["input_ids"], *[None] * 5, needs_first=True, vocabulary=50)
    assert_same(host_layout.to_device(own, CPU), own)


def on_gpu(*shape):
    """What can be asked of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), numel=lambda: math.prod(shape), dim=lambda: len(shape))


def test_both_inputs_are_refused_as_ever(moves):
    """Laid out on the host or not: embeddings are not left out in silence."""
    ids, embeds = INPUTS["one sentence"]["input_ids"], torch.zeros(1, 9, 16)
    with pytest.raises(ValueError, match="both were given"):
        inputs.prepare(make_model().config, ids, embeds, *[None] * 4, needs_first=True, vocabulary=50)
    with pytest.raises(ValueError, match="both were given"):
        layout.lay_out(tiny.both("bert")[1], ids, embeds, *[None] * 5)
    assert not moves


def test_a_graph_is_for_any_size():
    """Recorded on a device that is not the CPU, where the number of tokens must not become a condition."""
    ids = torch.zeros(3, 12, dtype=torch.int64, device="meta")
    model = make_model().to("meta")
    rows, columns = torch.export.Dim("rows", max=64), torch.export.Dim("columns", max=500)
    shapes = {"input_ids": {0: rows, 1: columns}, "attention_mask": {0: rows, 1: columns}}
    program = torch.export.export(
        model, (), {"input_ids": ids, "attention_mask": ids}, dynamic_shapes=shapes, strict=False
    )
    many = torch.zeros(30, 400, dtype=torch.int64, device="meta")
    assert program.module()(input_ids=many, attention_mask=many).last_hidden_state.shape == (30, 400, 16)


def test_what_is_laid_out_on_the_host(monkeypatch):
    assert host_layout.serves(on_gpu(2, 4096), None, on_gpu(1, 4096), on_gpu(3))
    assert not host_layout.serves(on_gpu(1, 8193))
    assert not host_layout.serves(None)
    assert not host_layout.serves(torch.zeros(1, 3, dtype=torch.int64))
    assert not host_layout.serves(on_gpu(1, 3), on_gpu(1, 3, 3))  # a mask per query
    with FakeTensorMode():
        assert not host_layout.serves(torch.zeros(1, 3, dtype=torch.int64, device="cuda"))
    assert not host_layout.serves(on_gpu(1, 3), torch.zeros(1, 3, device="meta"))
    with monkeypatch.context() as patched:
        patched.setattr(host_layout.modes, "is_captured", lambda: True)
        assert not host_layout.serves(on_gpu(1, 3))
    torch.func.vmap(lambda x: x if not host_layout.serves(on_gpu(1, 3)) else pytest.fail("served"))(torch.ones(2))
