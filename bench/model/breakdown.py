"""Where the time of erniem_fast goes: one forward and one step of training by op, beside what this machine allows.

An op's floor is the larger of two times: its floating-point operations at the measured rate of a large matrix product,
and the bytes that it cannot but read and write at the measured rate of a large copy. Both rates are medians of
measurements between the steps. (A copy also fetches what it overwrites: an op that works in place, as AdamW does, can
be faster than its floor.) CPU only.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from bench import INTERRUPTED
from bench.model.figures import Breakdown, OpTime, Reached
from bench.model.jobs import Spec, make_jobs
from bench.model.options import add_run_options, checkpoint
from bench.model.text import TOKENIZER, text_encoder
from bench.model.work import MATRIX_PRODUCTS, OPS, OPTIMIZER, count_work
from bench.parser import make_parser
from bench.record import begin, stem_of, write
from bench.report.breakdown import markdown, plot
from bench.roofline import Rates, measure_rates
from bench.timing import time_call
from erniem_fast import ErnieMModel, ops
from erniem_fast.matmul.libraries import LIBRARIES

CPU = torch.device("cpu")
REST = "everything else"
SPEC = Spec(32, "text", 32, rounds=5)
MAX_LENGTH = 512  # tokens


def main(argv: list[str] | None = None) -> int:
    """Run the breakdown; returns the exit code: 0, or 130 after Ctrl-C."""
    parser = make_parser("breakdown", __doc__)
    add_run_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error(f"--device {arguments.device}: only a CPU is measured; leave the option out")
    try:
        with checkpoint(arguments) as model:
            run_and_save(arguments, model)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m bench breakdown: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def run_and_save(arguments: argparse.Namespace, model: pathlib.Path) -> None:
    """Measure, print the report, and write it as JSON, Markdown and PNG.

    Args:
        arguments: what `add_run_options` asks for.
        model: folder of the checkpoint.
    """
    run = break_down(arguments, model)
    stem = stem_of(run, arguments.output)
    write(run, markdown(run), stem)
    plot(run, stem.with_suffix(".png"))


def break_down(arguments: argparse.Namespace, model_folder: pathlib.Path) -> Breakdown:
    """Time and floor of every op in one forward and in one step of training."""
    head = begin("breakdown", arguments)
    torch.set_num_threads(head.settings.threads)
    model = ErnieMModel.from_pretrained(model_folder, dtype=getattr(torch, head.settings.dtype))
    encode = text_encoder(arguments.model or TOKENIZER, MAX_LENGTH)
    (job,) = make_jobs([SPEC], encode, model.config.vocab_size, model.config.max_position_embeddings - 2)
    inputs = {name: torch.tensor(rows) for name, rows in job.batches[0].items()}
    lengths = inputs["attention_mask"].sum(1).tolist()
    steps = {"forward": forward, "training": train}
    rounds = {name: measure(step(model, inputs), name, model.dtype) for name, step in steps.items()}
    rates = Rates(**_medians([vars(each.rates) for taken in rounds.values() for each in taken]))
    reached, times = {}, {}
    for name, taken in rounds.items():
        work = count_work(model, lengths, name == "training")
        times[name] = op_times(
            _medians([each.ops for each in taken]), {op: each.floor(rates) for op, each in work.items()}
        )
        seconds = statistics.median(each.seconds for each in taken)
        reached[name] = Reached(seconds, sum(each.flops for each in work.values()) / seconds / rates.flops_per_second)
    return Breakdown(**vars(head), tokens=job.tokens, fill=job.fill, rates=rates, reached=reached, **times)


def forward(model: ErnieMModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    model.eval()
    return torch.inference_mode()(lambda: model(**inputs))


def train(model: ErnieMModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        hidden_state = model(**inputs).last_hidden_state
        hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclasses.dataclass(frozen=True)
class Round:
    """The rates of the machine, the seconds of a step without a profiler, and with one those of its ops."""

    rates: Rates
    seconds: float
    ops: dict[str, float]


def measure(step: Callable[[], object], name: str, dtype: torch.dtype) -> list[Round]:
    """SPEC.rounds of a step, after one that warms up; what no op accounts for is REST."""
    taken = []
    for repeat in tqdm(range(SPEC.rounds + 1), desc=f"breakdown, {name}", unit="step", disable=None):
        rates, seconds = measure_rates(CPU, dtype, rounds=1, warm_up=0), time_call(step, CPU).seconds
        with _labelled_ops(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            total = time_call(step, CPU).seconds
        if repeat:
            ops_seconds = by_op(profiler.events())
            ops_seconds[REST] = total - sum(ops_seconds.values())
            taken.append(Round(rates, seconds, ops_seconds))
    return taken


def op_times(seconds: dict[str, float], floors: dict[str, float]) -> list[OpTime]:
    """The longest first and the total last."""
    rows = sorted(seconds.items(), key=lambda row: -row[1])
    floors = {**floors, "total": sum(floors.values())}
    total = ("total", sum(seconds.values()))
    return [_op_time(op, taken, floors.get(op)) for op, taken in [*rows, total]]


def _op_time(op, seconds, floor):
    return OpTime(op, seconds, floor, seconds / floor if floor else None)


def _medians(rounds):
    return {name: statistics.median(each.get(name, 0.0) for each in rounds) for name in rounds[0]}


def by_op(events: Iterable) -> dict[str, float]:
    """Seconds of the outermost events that belong to an op, by op."""
    seconds = {}
    for event in events:
        op, ancestor = _op(event), event.cpu_parent
        while op and ancestor:
            if _op(ancestor):
                op = None
            ancestor = ancestor.cpu_parent
        if op:
            seconds[op] = seconds.get(op, 0.0) + event.time_range.elapsed_us() / 1e6
    return seconds


def _op(event):
    namespace, _, name = event.name.rpartition("::")
    if namespace == "erniem_fast":
        return name.removesuffix("_backward")
    if name.startswith("Optimizer.step"):
        return OPTIMIZER
    return MATRIX_PRODUCTS if namespace == "aten" and name in ("linear", "addmm", "mm", "matmul") else None


@contextlib.contextmanager
def _labelled_ops():
    """In inference the ops leave no event of their own, nor do the products of some libraries; here they do."""

    def labelled(op, function):
        def call(*args):
            with record_function(f"erniem_fast::{op}"):
                return function(*args)

        return call

    products = {name: labelled(MATRIX_PRODUCTS, function) for name, function in LIBRARIES.items()}
    functions = {op: labelled(op, getattr(ops, op)) for op in OPS}
    with mock.patch.multiple(ops, **functions), mock.patch.dict(LIBRARIES, products):
        yield
