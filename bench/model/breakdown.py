"""Where the time of erniem_fast goes: one forward and one step of training by op, beside what this machine allows.

An op's floor is the larger of two times: its floating-point operations at the measured rate of a large matrix product,
and the bytes that it cannot but read and write at the measured rate of a large copy. Both rates are medians of
measurements between the steps. (A copy also fetches what it overwrites: an op that works in place, as AdamW does, can
be faster than its floor.) CPU only.
"""

import contextlib
import dataclasses
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from bench.model.jobs import Spec, make_jobs
from bench.record import begin, write
from bench.report.bars import plot_breakdown
from bench.report.model import breakdown_markdown
from erniem_fast import ErnieMModel, ops

OPS = ("embeddings", "attention", "add_layernorm", "bias_gelu_dropout")
MATRIX_PRODUCTS, OPTIMIZER, REST = "matrix products", "AdamW", "everything else"
SPEC = Spec(32, "text", 32, rounds=5)
MATRIX, COPIED = 2048, 2**26  # sizes of what the rates are measured with, beyond any cache in the copy's case
MAX_LENGTH = 512  # tokens


def breakdown(model_folder, encode, dtype, threads):
    """Time and floor of every op in one forward and in one step of training.

    Returns:
        Ready for JSON: the measured `rates`; for "forward" and "training" a list of rows with `op`, `seconds`, `floor`
        (None for what has none) and `ratio`, the total last; and in `reached`, for each of the two, its `seconds`
        without a profiler, and the `share` of the rate of matrix products that its operations reach in them.
    """
    torch.set_num_threads(threads)
    model = ErnieMModel.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    (job,) = make_jobs([SPEC], encode, model.config.vocab_size, model.config.max_position_embeddings - 2)
    inputs = {name: torch.tensor(rows) for name, rows in job.batches[0].items()}
    lengths = inputs["attention_mask"].sum(1).tolist()
    steps = {"forward": forward, "training": train}
    rounds = {name: measure(step(model, inputs), name, model.dtype) for name, step in steps.items()}
    rates = _medians([each["rates"] for taken in rounds.values() for each in taken])
    result = {"tokens": job.tokens, "fill": job.fill, "rates": rates, "reached": {}}
    for name, taken in rounds.items():
        work = count(model, lengths, name == "training")
        floors = {op: floor(each, rates) for op, each in work.items()}
        result[name] = _rows(_medians([each["ops"] for each in taken]), floors)
        seconds = statistics.median(each["seconds"] for each in taken)
        operations = sum(each.operations for each in work.values())
        share = operations / seconds / rates["operations_per_second"]
        result["reached"][name] = {"seconds": seconds, "share": share}
    return result


def forward(model, inputs):
    model.eval()
    return torch.inference_mode()(lambda: model(**inputs))


def train(model, inputs):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        hidden_state = model(**inputs).last_hidden_state
        hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step, name, dtype):
    """SPEC.rounds times: the rates, the `seconds` of `step`, and of its `ops`; what no op accounts for is REST."""
    taken = []
    for repeat in tqdm(range(SPEC.rounds + 1), desc=f"breakdown, {name}", unit="step", disable=None):
        rates, seconds = measure_rates(dtype), _seconds(step)
        with _labelled_ops(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            total = _seconds(step)
        if repeat:
            ops_seconds = by_op(profiler.events())
            ops_seconds[REST] = total - sum(ops_seconds.values())
            taken.append({"rates": rates, "seconds": seconds, "ops": ops_seconds})
    return taken


def _medians(rounds):
    return {name: statistics.median(each.get(name, 0.0) for each in rounds) for name in rounds[0]}


def by_op(events):
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
    """In inference the ops leave no event of their own; here they do."""
    originals = {op: getattr(ops, op) for op in OPS}

    def labelled(op):
        def call(*args):
            with record_function(f"erniem_fast::{op}"):
                return originals[op](*args)

        return call

    for op in OPS:
        setattr(ops, op, labelled(op))
    try:
        yield
    finally:
        for op in OPS:
            setattr(ops, op, originals[op])


@dataclasses.dataclass(frozen=True)
class Work:
    """What an op cannot do without: floating-point operations, and bytes read and written."""

    operations: float = 0.0
    bytes: float = 0.0


def count(model, lengths, training):
    """The work of every op on sequences of these lengths, of all layers together."""
    config, size = model.config, model.dtype.itemsize
    tokens, layers, hidden, inner = sum(lengths), config.num_hidden_layers, config.hidden_size, config.intermediate_size
    pairs = sum(length**2 for length in lengths)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    # Rows of `hidden` that an op reads and writes for each token. Backward of a norm: two gradients come out of one and
    # the op's two inputs; of a GELU: one out of one and its input; of attention: q, k and v, and their gradients.
    moved = {"embeddings": (3, 3), "attention": (4, 8), "add_layernorm": (3, 5)}
    forward, backward = ({op: rows[i] * tokens * hidden for op, rows in moved.items()} for i in range(2))
    elements = {op: forward[op] + training * backward[op] for op in moved}
    products = 2 * tokens * (4 * hidden**2 + 2 * hidden * inner)
    return {
        MATRIX_PRODUCTS: Work(operations=layers * products * (3 if training else 1)),
        "attention": Work(
            layers * 4 * pairs * hidden * (3.5 if training else 1), layers * elements["attention"] * size
        ),
        "add_layernorm": Work(bytes=2 * layers * elements["add_layernorm"] * size),
        "bias_gelu_dropout": Work(bytes=layers * (5 if training else 2) * tokens * inner * size),
        "embeddings": Work(bytes=elements["embeddings"] * size),
        # Of the word table's gradient only the batch's words are in memory.
        **({OPTIMIZER: Work(bytes=(7 * parameters - table) * size)} if training else {}),
    }


def floor(work, rates):
    """Seconds that this machine needs at least."""
    return max(work.operations / rates["operations_per_second"], work.bytes / rates["bytes_per_second"])


def measure_rates(dtype):
    """Rates of a large matrix product and of a large copy, of which counts what is read and what is written."""
    a, b, product = torch.randn(3, MATRIX, MATRIX).to(dtype)
    source = torch.randn(COPIED // dtype.itemsize).to(dtype)
    target = torch.zeros_like(source)
    return {
        "operations_per_second": 2 * MATRIX**3 / _seconds(lambda: torch.mm(a, b, out=product)),
        "bytes_per_second": 2 * COPIED / _seconds(lambda: target.copy_(source)),
    }


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rows(seconds, floors):
    total = {"op": "total", "seconds": sum(seconds.values()), "floor": sum(floors.values())}
    rows = [{"op": op, "seconds": taken, "floor": floors.get(op)} for op, taken in seconds.items()]
    rows.sort(key=lambda row: -row["seconds"])
    return [{**row, "ratio": row["seconds"] / row["floor"] if row["floor"] else None} for row in [*rows, total]]


def run_and_save(arguments, model, encode):
    """Measure, print the report, and write it as JSON, Markdown and PNG."""
    run = begin("breakdown", arguments)
    run |= breakdown(model, encode, arguments.dtype, run["settings"]["threads"])
    stem = write(run, breakdown_markdown(run), arguments.output)
    plot_breakdown(run, stem.with_suffix(".png"))
