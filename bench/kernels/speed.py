"""Times each op beside PyTorch's own ways to do the same work, and beside the floor that the device sets.

The floor of a step is the larger of two times: the fewest bytes that it reads and writes, at the rate of a copy, and
the fewest FLOP, at the rate of a matrix product; both rates are measured in the same run. Results are compared before a
time counts. Contenders take turns, round after round; ratios are taken round by round.
"""

import argparse
import datetime
import json
import pathlib
import sys
from time import monotonic as seconds_now

import torch
from tqdm import tqdm

from bench import ROOT
from bench.kernels.jobs import MAKERS, OURS, P, make_job
from bench.machine import describe, slug
from bench.model.checkpoint import SIZES
from bench.model.summary import quartiles
from bench.report.kernels import markdown, plot
from bench.timing import WARM_UP, measured_rates, take_turns
from erniem_fast import extension
from erniem_fast.ops.implementation import choose

LENGTHS = ("32", "64", "128", "256", "512", "ragged")
# Largest difference of a value in units of the root mean square: of rounding a few times, and nothing else.
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}
STEPS = {
    "inference": "forward without dropout, nothing saved",
    "forward": f"forward in training, dropout {P}",
    "backward": f"backward, dropout {P}",
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--ops", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: both")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="of attention (default: all)")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 1024, help="default here: %(default)s")
    parser.add_argument(
        "--dtype", choices=TOLERANCE, default="bfloat16" if cuda else "float32", help="%(default)s here"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each contender (default: 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long to start")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no job after this")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the benchmark; returns the exit code: 0, 1 where a contender failed or was refused, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        extension.build([arguments.device.type])
    except extension.BuildError as error:
        print(f"the native embeddings are not measured: {error}", file=sys.stderr)
    machine = describe(arguments.device)
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": {"dtype": arguments.dtype, "rounds": arguments.rounds, "torch": torch.__version__, "steps": STEPS},
        "implementations": {op: choose(op, arguments.device, getattr(torch, arguments.dtype)) for op in arguments.ops},
        "rates": measured_rates(arguments.device, getattr(torch, arguments.dtype)),
        "results": [],
        "left_out": [],
        "interrupted": False,
    }
    try:
        run_jobs(arguments, run)
    except KeyboardInterrupt:
        run["interrupted"] = True
    if not run["results"]:
        return 130
    save(run, arguments.output or ROOT / "bench/results" / slug(machine))
    return 130 if run["interrupted"] else int(any(result["problem"] for result in run["results"]))


def jobs_of(arguments):
    """`(op, size, lengths)` of every job, one size after the other."""
    for size in arguments.sizes:
        for op in arguments.ops:
            for lengths in arguments.lengths if op == "attention" else ("512",):
                yield op, size, lengths


def run_jobs(arguments, run):
    """Measure job after job into `run`."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    jobs, start = list(jobs_of(arguments)), seconds_now()
    with tqdm(total=len(jobs) * len(STEPS) * (WARM_UP + arguments.rounds), unit="round", disable=None) as bar:
        for op, size, lengths in jobs:
            if seconds_now() - start > arguments.budget:
                run["left_out"].append(f"{op}, {size}, {lengths}")
                continue
            # torch.compile has no sparse gradients, and its dozens of shapes of attention would take minutes.
            compiled = not arguments.no_compile and op != "embeddings" and (op != "attention" or lengths == "512")
            job = make_job(op, size, lengths, arguments.tokens, dtype, device, compiled)
            bar.set_description(job.name)
            run["results"] += measure(job, TOLERANCE[arguments.dtype], arguments.rounds, run["rates"], device, bar)
            del job  # its tensors would still be there beside the next one's


def measure(job, tolerance, rounds, rates, device, bar):
    """The results of a job, ready for JSON: one for each step and contender."""
    checked = list(check(job, tolerance))
    results = []
    for step, (size, flops) in job.work.items():
        floor = max(size / rates["bytes_per_second"], flops / rates["flops_per_second"])
        present = [each for each in checked if step in each[0].steps]
        calls = [call_of(contender, step) for contender, _, problem in present if problem is None]
        seconds = iter(take_turns(calls, rounds, device, bar))
        ours = None
        for contender, difference, problem in present:
            taken = next(seconds) if problem is None else []
            ours = taken if contender.name == OURS else ours
            ratios = [theirs / own for theirs, own in zip(taken, ours, strict=True)] if taken and ours else None
            results.append(
                {
                    **{name: getattr(job, name) for name in ("op", "size", "lengths", "tokens")},
                    "step": step,
                    "contender": contender.name,
                    "bytes": size,
                    "flops": flops,
                    "floor": floor,
                    "seconds": quartiles(taken) if taken else None,
                    "speedup": quartiles(ratios) if ratios else None,
                    "difference": difference,
                    "problem": problem,
                    "rounds": taken,
                }
            )
    return results


def check(job, tolerance):
    """Runs every contender once; yields it, how far its results are from the first one's, and why it is refused."""
    expected = None
    for contender in job.contenders:
        try:
            results = outputs(contender)
            for step in contender.steps:
                call_of(contender, step)()
        except Exception as error:  # whatever its compiler may raise; the others go on
            yield contender, None, f"{job.name}: {contender.name} failed: {str(error).strip().splitlines()[0]}"
            continue
        if expected is None:
            expected, first = results, contender.name
        largest = max(difference(*pair) for pair in zip(results, expected, strict=True))
        problem = None
        if not largest <= tolerance:  # NaN is refused too
            problem = (
                f"{job.name}: {contender.name} refused: it differs from {first} by {largest:.2g}, in units of the root"
                f" mean square ({tolerance:g} is allowed)"
            )
        yield contender, largest, problem


def outputs(contender):
    """The real tokens' result and first gradient; without dropout, whose masks are everybody's own."""
    out, leaves = training_forward(contender, 0.0)
    (of_first,) = torch.autograd.grad(out, leaves[:1], contender.grad)
    rows = of_first.shape[:-1] == out.shape[:-1]
    return contender.real(out.detach()).float(), (contender.real(of_first) if rows else of_first).float()


def difference(output, reference):
    """Largest difference over the root mean square of `reference`."""
    return ((output - reference).abs().max() / reference.square().mean().sqrt()).item()


def training_forward(contender, p):
    leaves = [leaf.requires_grad_() for leaf in contender.leaves]
    return contender.forward(p), leaves


def call_of(contender, step):
    """What is timed: a function without arguments."""
    if step == "inference":
        return torch.no_grad()(lambda: contender.forward(0.0))
    if step == "forward":
        return lambda: training_forward(contender, P)
    out, leaves = training_forward(contender, P)
    return lambda: torch.autograd.grad(out, leaves, contender.grad, retain_graph=True)


def save(run, folder):
    """Print the report and write it as JSON, Markdown and, where matplotlib is installed, PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels-{run['settings']['dtype']}"
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(run), encoding="utf-8")
    plotted = plot(run, stem.with_suffix(".png"))
    print(f"\n{markdown(run)}\n{stem}.json, .md{' and .png' if plotted else ''} hold this and every round")


if __name__ == "__main__":
    sys.exit(main())
