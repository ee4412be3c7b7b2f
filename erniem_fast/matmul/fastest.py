"""Which library is fastest on this machine, measured once for each kind of product and range of tokens.

The processor's vendor does not tell: MKL, PyTorch's own library, reaches its full rate on Intel's processors and less
than half on AMD's. Results are kept in the cache folder, in a file for each machine, number of threads and version.
"""

import hashlib
import json
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import cycle, product
from math import inf
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

from .. import flags
from ..native import library
from ..native.library import BuildError
from .libraries import LIBRARIES, NATIVE, NATIVE_BFLOAT16, NATIVE_PACKED, PACKED, TORCH, available, available_packed

FORWARD, GRAD_X, GRAD_WEIGHT = KINDS = ("forward", "grad_x", "grad_weight")
_BFLOAT16 = "bfloat16"  # a forward with weights in bfloat16

# The largest number of tokens of each range, and the numbers that stand for it. They differ, because oneDNN prepares
# itself for every number that is new to it, which takes as long as a product of tens of tokens.
RANGES = {3: range(1, 4), 16: range(8, 13), 64: range(36, 41), 256: range(128, 132), inf: range(288, 291)}

# Products of the base model, as (in_features, out_features), and how many of a forward have the same shape.
SHAPES = ((768, 3072), (3072, 768))
_LAYERS = 12
# Weights that take turns, so that they do not stay in the caches, as those of a model do not.
_WEIGHTS = 3

# Another library than PyTorch's has to save this part of its time: less may be noise.
_LEAST_GAIN = 0.05

# Two halves of a measurement agree to this factor unless other work disturbs them. Beside eight busy processes on two
# cores, which once chose the wrong library for good, they were several times apart.
_STEADY = 1.5
_MOST_ROUNDS = 4  # of each half
_DISTURBED = " (other work disturbed it; `python -m erniem_fast build` measures again)"

Seconds = dict[str, float]  # by library
Products = dict[tuple[str, tuple[int, int]], float]  # seconds by library and shape

_known: dict[tuple, dict[str, Seconds]] = {}  # by `_situation`: the seconds of each `_label`
_lock = threading.Lock()  # measurements at the same time would disturb each other


@flags.while_held
def fastest(kind: str, tokens: int) -> str:
    """The library for a product of a kind; the same at every call with as many threads.

    The first call for a range of tokens measures, for about a tenth of a second, unless an earlier process did.

    Args:
        kind: one of `KINDS`.
        tokens: at least 1.
    """
    limit = next(limit for limit in RANGES if tokens <= limit)
    return choice(_seconds(kind, limit))


def choice(seconds: Seconds) -> str:
    """The library with the least time for weights as they are; PyTorch's, if that saves too little."""
    name = min((each for each in seconds if each not in PACKED), key=seconds.get)
    return name if seconds[name] <= (1 - _LEAST_GAIN) * seconds[TORCH] else TORCH


def packing() -> str | None:
    """The library with packed weights whose forwards take the least time; None if weights as they are take no longer.

    A model is packed for all its calls, so the ranges of tokens count alike. Native packed products are
    taken even if they only break even, because all layers then run in one call: on an EPYC (Zen 4) these products took
    0.95 of the time of unpacked ones, but whole forwards of 24 and 352 tokens 0.89, and those of 1,024 tokens 0.93 to
    1.00.
    """
    names = available_packed(torch.float32)
    shares = {name: geometric_mean(each[name] / each[choice(each)] for each in _by_range(FORWARD)) for name in names}
    best = _preferred(shares)
    most = 1.0 if best == NATIVE_PACKED else 1 - _LEAST_GAIN
    return best if best is not None and shares[best] <= most else None


def bfloat16() -> str | None:
    """The library whose forwards with weights in bfloat16 take the least time; None if there is none."""
    names = available_packed(torch.bfloat16)
    if len(names) < 2:
        return next(iter(names), None)
    return _preferred({name: geometric_mean(each[name] for each in _by_range(_BFLOAT16)) for name in names})


def _preferred(times: Seconds) -> str | None:
    """The library with the least time; the native one if it takes little more, as all layers are one call of it."""
    best = min(times, key=times.get, default=None)
    native = next((name for name in times if name in (NATIVE_PACKED, NATIVE_BFLOAT16)), best)
    return native if best is not None and times[native] * (1 - _LEAST_GAIN) <= times[best] else best


def _by_range(kind: str) -> list[Seconds]:
    return [_seconds(kind, limit) for limit in RANGES]


def measure_all(report: Callable[[str], None] = lambda line: None) -> None:
    """Measures what was not measured yet, or was disturbed by other work, in a few seconds.

    Args:
        report: takes a line before each kind of product that is measured.
    """
    with _lock:
        known = _known.setdefault(_situation(), _kept())
        for label in _disturbed():
            known.pop(label, None)
    for kind in _measured():
        if not all(_label(kind, limit) in _found() for limit in RANGES):
            report(f"timing products: {kind}")
        _by_range(kind)


def report() -> list[str]:
    """A line for each kind and range of tokens: the choice, and the milliseconds of all libraries."""
    known, disturbed = _found(), _disturbed()
    return [
        f"{label:18} {_described(known.get(label))}" + (_DISTURBED if label in disturbed else "")
        for label in (_label(k, limit) for k in _measured() for limit in RANGES)
    ]


def _found() -> dict[str, Seconds]:
    """The times that were measured, in this process or in an earlier one."""
    return _known.get(_situation()) or _kept()


def _described(seconds: Seconds | None) -> str:
    if seconds is None:
        return "is not measured yet: `python -m erniem_fast build`, or the first use, does"
    times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
    return f"by {choice(seconds) if TORCH in seconds else _preferred(seconds):7} {times}"


def _label(kind: str, limit: float) -> str:
    """As "forward 4-16" and "forward 257+"."""
    limits = [0, *RANGES]
    first = limits[limits.index(limit) - 1] + 1
    return f"{kind} {first}+" if limit == inf else f"{kind} {first}-{limit}"


def _seconds(kind: str, limit: float) -> Seconds:
    """The times of all libraries: those of this process, else those in the cache, else measured now.

    Those of a disturbed measurement are kept too: else each process would choose anew, and get other bits.
    """
    situation, label = _situation(), _label(kind, limit)
    with _lock:
        if situation not in _known:
            _known[situation] = _kept()
        known = _known[situation]
        if label not in known:
            known[label], steady = _measure(kind, RANGES[limit])
            _keep(label, known[label], steady)
        return known[label]


def _situation() -> tuple:
    """The conditions of a measurement that can change within a process."""
    return torch.get_num_threads(), _native_path(), *available()


def _measured() -> list[str]:
    """The kinds that leave a choice."""
    return [*KINDS, *([_BFLOAT16] if len(_candidates(_BFLOAT16)) > 1 else [])]


def _candidates(kind: str) -> tuple[str, ...]:
    """The libraries for a kind. The native product would have to copy the transposed operands of gradients."""
    if kind == _BFLOAT16:
        return available_packed(torch.bfloat16)
    if kind != FORWARD:
        return tuple(name for name in available() if name != NATIVE)
    return *available(), *available_packed(torch.float32)


@torch.no_grad()
def _measure(kind: str, sizes: range) -> tuple[Seconds, bool]:
    """The time of one product of each of `SHAPES`, by library: the least of several rounds, in which all take turns.

    It includes a share of the time that a library takes to prepare for a new shape: all layers of a model multiply the
    same shapes, so each layer bears a part of the preparation.

    Returns:
        The times; and whether the two halves of the rounds agree, so that nothing has disturbed them.
    """
    memories = torch.ones(_WEIGHTS, SHAPES[0][0] * SHAPES[0][1], dtype=torch.float32, device="cpu")
    weights, names = cycle(memories), _candidates(kind)
    packed = {
        (name, shape): cycle([PACKED[name][0](each.view(*reversed(shape))) for each in memories])
        for name in names
        if name in PACKED
        for shape in SHAPES
    }

    def least(before: Products) -> Products:
        """The least times of a round, and of those before."""
        times = dict(before)
        for tokens, shape in product(sizes, SHAPES):
            operands = _operands(kind, tokens, *shape)
            for name in names:
                weight = next(packed[name, shape]) if name in PACKED else next(weights).view(*reversed(shape))
                times[name, shape] = min(times[name, shape], _time(name, kind, operands, weight))
        return times

    none = dict.fromkeys(product(names, SHAPES), inf)
    first, *halves = (least(none) for _ in range(3))
    for _ in range(_MOST_ROUNDS - 1):
        if not _agree(*halves):
            halves = list(map(least, halves))
    # The first call of a shape includes the preparation: the time beyond that of later calls.
    again = {each: min(half[each] for half in halves) for each in none}
    extra = {each: max(0.0, first[each] - again[each]) / _LAYERS for each in none}
    seconds = {name: sum(again[name, shape] + extra[name, shape] for shape in SHAPES) for name in names}
    return seconds, _agree(*halves)


def _agree(one: Products, other: Products) -> bool:
    return all(max(one[each], other[each]) <= _STEADY * min(one[each], other[each]) for each in one)


def _operands(kind: str, tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the gradient of the result, and for a forward, which reuses memory, memory for the result."""
    x, grad = (torch.ones(tokens, width, dtype=torch.float32, device="cpu") for width in (inputs, outputs))
    return x, grad, torch.ones_like(grad) if kind in (FORWARD, _BFLOAT16) else None


def _time(name: str, kind: str, operands: tuple[Tensor, Tensor, Tensor | None], weight: Tensor) -> float:
    x, grad, out = operands
    multiply = PACKED[name][1] if name in PACKED else LIBRARIES[name]
    if kind == GRAD_X:
        x, weight = grad, weight.t()
    elif kind == GRAD_WEIGHT:
        x, weight = grad.t(), x.t()
    start = time.perf_counter()
    multiply(x, weight, None, out)
    return time.perf_counter() - start


def _machine() -> dict[str, object]:
    """The conditions under which the times in the cache hold."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "libraries": list(available()),
        "native": Path(_native_path()).name,
        "steady": _STEADY,
    }


def _native_path() -> str:
    """The path of the native library, whether it is built or not; its name has a digest of what it depends on."""
    try:
        return str(library.path("cpu"))
    except BuildError:
        return ""


@cache
def _processor() -> str:
    """The processor's model."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _file() -> Path:
    digest = hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()
    return library.cache() / f"matmul-{digest[:16]}.json"


def _kept() -> dict[str, Seconds]:
    """The times in the cache; without those that are damaged."""
    try:
        found = _content()["seconds"].items()
        return {label: seconds for label, seconds in found if _is_complete(label, seconds)}
    except (KeyError, TypeError, AttributeError):
        return {}


def _disturbed() -> set[str]:
    """The labels of times in the cache whose measurement was disturbed."""
    try:
        return set(_content()["disturbed"])
    except (KeyError, TypeError):
        return set()


def _content() -> dict[str, object]:
    """What the cache holds, if it is for this machine."""
    try:
        path = library.trusted(_file())
        content = json.loads(path.read_text()) if path is not None else {}
        return content if content["machine"] == _machine() else {}
    except (BuildError, OSError, ValueError, KeyError, TypeError):
        return {}


def _is_complete(label: str, seconds: object) -> bool:
    """Whether these are times of all libraries for a kind."""
    names = _candidates(label.split()[0])
    return tuple(seconds) == names and all(isinstance(each, float) and 0 < each < inf for each in seconds.values())


def _keep(label: str, seconds: Seconds, steady: bool) -> None:
    """Writes times into the cache, if it can be written: without it, each process measures for itself."""
    with suppress(BuildError, OSError):
        path = _file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        library.check_trust(path.parent)
        disturbed = sorted(_disturbed() - {label} | ({label} if not steady else set()))
        found = {"machine": _machine(), "seconds": {**_kept(), label: seconds}, "disturbed": disturbed}
        content = json.dumps(found, indent=1)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder, path.name)
            file.touch(mode=0o644)
            file.write_text(content + "\n")
            os.replace(file, path)
