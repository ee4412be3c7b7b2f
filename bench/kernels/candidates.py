"""What the sweep times: calls of the kernels' host functions at the base model's size, and ways to launch them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.jobs import EPS, P, dropout_of
from bench.model.checkpoint import SIZES
from erniem_fast.batch import TokenBatch
from erniem_fast.kernels import add_norm, attention, bias_gelu
from erniem_fast.kernels.device import Device
from erniem_fast.reference import Norm

SIZE = "base"
HIDDEN, HEADS, FEATURES = (SIZES[SIZE][name] for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
HEAD_DIM = HIDDEN // HEADS
SCALE = HEAD_DIM**-0.5

Launch = dict[str, object]  # keyword arguments of a host function: its configuration and, for some, a design
Call = Callable[..., tuple[Tensor, ...]]  # runs a host function by a launch, and returns the results to compare


class Problem(NamedTuple):
    """A host function at one size.

    Attributes:
        op, step: as the benchmark of the ops calls them; "inference" and "forward" run the same function, without
            dropout and with it.
        lengths: of the sequences.
        dropout: whether elements are dropped.
    """

    op: str
    step: str
    lengths: str
    dropout: bool

    @property
    def name(self) -> str:
        return f"{self.op} {self.step}, {self.lengths}, {'dropout' if self.dropout else 'plain'}"


def problems() -> list[Problem]:
    """First those whose kernels have changed since they were swept, or that lose against others; then the rest."""

    def of_attention(lengths, dropout):
        return Problem("attention", "forward" if dropout else "inference", lengths, dropout)

    def backward_of_attention(lengths, dropout):
        return Problem("attention", "backward", lengths, dropout)

    return [
        Problem("add_norm", "backward", "512", True),
        of_attention("128", False),
        of_attention("256", False),
        of_attention("512", False),
        backward_of_attention("512", True),
        backward_of_attention("128", True),
        backward_of_attention("64", True),
        of_attention("512", True),
        of_attention("128", True),
        of_attention("ragged", False),
        backward_of_attention("ragged", True),
        backward_of_attention("512", False),
        backward_of_attention("128", False),
        of_attention("64", False),
        of_attention("64", True),
        of_attention("ragged", True),
        backward_of_attention("64", False),
        backward_of_attention("ragged", False),
        Problem("add_norm", "inference", "512", False),
        Problem("add_norm", "forward", "512", True),
        Problem("bias_gelu", "inference", "512", False),
        Problem("bias_gelu", "forward", "512", True),
        Problem("bias_gelu", "backward", "512", True),
    ]


def make_call(problem: Problem, batch: TokenBatch, random: Callable[..., Tensor]) -> Call:
    """The call of a problem's host function on tensors of values from `random`, which takes a shape."""
    dropout = dropout_of(batch, P if problem.dropout else 0)
    if dropout is not None:  # host functions take contiguous tensors, which an op makes of any
        columns, sequence_ids = dropout.columns.contiguous(), dropout.sequence_ids.contiguous()
        dropout = dropout._replace(columns=columns, sequence_ids=sequence_ids)
    return CALLS[problem.op, problem.step == "backward"](batch, random, dropout)


def _attention_forward(batch, random, dropout):
    qkv = random(batch.tokens, 3 * HIDDEN)

    def call(**launch):
        return attention.forward(qkv, batch.sequences, HEADS, SCALE, dropout, **launch)[:1]

    return call


def _attention_backward(batch, random, dropout):
    qkv, grad = random(batch.tokens, 3 * HIDDEN), random(batch.tokens, HIDDEN)
    case = (batch.sequences, HEADS, SCALE, dropout)
    out, statistics = attention.forward(qkv, *case)

    def call(**launch):
        return (attention.backward(grad, out, statistics, qkv, *case, **launch),)

    return call


def _bias_gelu_forward(batch, random, dropout):
    x, bias = random(batch.tokens, FEATURES), random(FEATURES)

    def call(**launch):
        return (bias_gelu.forward(x, bias, "gelu", dropout, **launch),)

    return call


def _bias_gelu_backward(batch, random, dropout):
    grad, x, bias = random(batch.tokens, FEATURES), random(batch.tokens, FEATURES), random(FEATURES)

    def call(**launch):
        return bias_gelu.backward(grad, x, bias, "gelu", dropout, **launch)

    return call


def _add_norm_forward(batch, random, dropout):
    residual, x, bias = random(batch.tokens, HIDDEN), random(batch.tokens, HIDDEN), random(HIDDEN)
    norm = Norm(random(HIDDEN), random(HIDDEN), EPS)

    def call(**launch):
        results = add_norm.forward(residual, x, bias, norm, dropout, save=dropout is not None, **launch)
        return tuple(each for each in results if each is not None)

    return call


def _add_norm_backward(batch, random, dropout):
    grad, z = random(batch.tokens, HIDDEN), random(batch.tokens, HIDDEN)
    norm = Norm(random(HIDDEN), random(HIDDEN), EPS)

    def call(**launch):
        return add_norm.backward(grad, z, norm, dropout, **launch)

    return call


CALLS = {
    ("attention", False): _attention_forward,
    ("attention", True): _attention_backward,
    ("bias_gelu", False): _bias_gelu_forward,
    ("bias_gelu", True): _bias_gelu_backward,
    ("add_norm", False): _add_norm_forward,
    ("add_norm", True): _add_norm_backward,
}


def launches(problem: Problem, batch: TokenBatch, device: Device, dtype: torch.dtype) -> list[Launch]:
    """The ways to launch a problem's host function: the one that is shipped, then the others."""
    shipped, others = LAUNCHES[problem.op, problem.step == "backward"](problem, batch, device, dtype)
    return [shipped, *(each for each in others if each != shipped)]


def _attention_forward_launches(problem, batch, device, dtype):
    length = batch.sequences.max_seqlen
    shipped = attention.forward_config(device.arch, dtype, HEAD_DIM, length, problem.dropout)
    if length <= 64:
        others = _grid(shipped, [{"block": 64, "warps": 4}], step=(32, 64), stages=(1, 2, 3))
    else:
        others = _grid(shipped, _TILES, step=(32, 64, 128), stages=(2, 3, 4))
    return {"config": shipped}, [{"config": config} for config in others]


def _attention_backward_launches(problem, batch, device, dtype):
    length = batch.sequences.max_seqlen
    case = (device.arch, dtype, HEAD_DIM, length)
    two, one = attention.backward_config(*case[:3], problem.dropout), attention.one_pass_config(*case)
    pairs = batch.sequences.longest_first.shape[0] * HEADS
    one_pass = attention.takes_one_pass(one, pairs, length, problem.dropout, device)
    tiles = [{"block": 64, "warps": 4}, {"block": 64, "warps": 8}] + (_TILES[1:] if length > 64 else [])
    in_two = _grid(two, tiles, step=(32, 64), stages=(2, 3))
    in_one = [] if one is None else _grid(one, tiles, step=(32, 64), stages=(1, 2))
    launches = [{"config": config, "one_pass": False} for config in (two, *in_two)]
    launches += [{"config": config, "one_pass": True} for config in (one, *in_one) if config is not None]
    return {"config": one if one_pass else two, "one_pass": one_pass}, _without_repeats(launches)


# A group of four warps owns at least 64 rows, because Hopper's matrix instruction takes so many.
_TILES = [{"block": 64, "warps": 4}, {"block": 128, "warps": 4}, {"block": 128, "warps": 8}]


def _bias_gelu_launches(problem, batch, device, dtype):
    choose = bias_gelu.backward_config if problem.step == "backward" else bias_gelu.forward_config
    shipped = choose(device.lanes, FEATURES, dtype.itemsize)
    warps = [{"warps": warps} for warps in (4, 8)]
    others = _grid(shipped, warps, rows=(4, 8, 16), programs=(2, 4, 8, 16))
    return {"config": shipped}, [{"config": config} for config in others]


# A row or two for each warp.
_ROWS = [{"warps": warps, "rows": warps * rows} for warps in (2, 4, 8) for rows in (1, 2)]


def _add_norm_forward_launches(problem, batch, device, dtype):
    shipped = add_norm.forward_config(device, HIDDEN, dtype.itemsize)
    return {"config": shipped}, [{"config": config} for config in _grid(shipped, _ROWS)]


# Four, eight and twelve warps of a multiprocessor, in programs of one row or of several.
_RESIDENT = [
    {"warps": warps, "rows": warps, "programs": resident // warps} for warps in (1, 2, 4) for resident in (4, 8, 12)
]


def _add_norm_backward_launches(problem, batch, device, dtype):
    shipped = add_norm.backward_config(device, HIDDEN, dtype.itemsize)
    return {"config": shipped}, [{"config": config} for config in _grid(shipped, _RESIDENT, stages=(1, 2, 3, 4))]


LAUNCHES = {
    ("attention", False): _attention_forward_launches,
    ("attention", True): _attention_backward_launches,
    ("bias_gelu", False): _bias_gelu_launches,
    ("bias_gelu", True): _bias_gelu_launches,
    ("add_norm", False): _add_norm_forward_launches,
    ("add_norm", True): _add_norm_backward_launches,
}


def _grid(shipped, together: list[dict[str, int]], **fields: Iterable[int]) -> Iterator:
    """Configurations that differ from the shipped one in fields that change `together`, and in each of `fields`."""
    for changes, *values in product(together, *fields.values()):
        yield dataclasses.replace(shipped, **changes, **dict(zip(fields, values, strict=True)))


def _without_repeats(launches: list[Launch]) -> list[Launch]:
    return [launch for index, launch in enumerate(launches) if launch not in launches[:index]]


def describe_launch(launch: Launch) -> str:
    """As the report names it: "one pass, block 64, step 32, warps 4, stages 1"."""
    fields = dataclasses.asdict(launch["config"])
    design = {True: ["one pass"], False: ["two passes"], None: []}[launch.get("one_pass")]
    return ", ".join([*design, *(f"{name} {value}" for name, value in fields.items())])
