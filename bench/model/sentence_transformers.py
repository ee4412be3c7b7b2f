"""Models of sentence-transformers before and after `optimize`: encode, a reranker, and a single query.

The weights are those of an ERNIE-M checkpoint, as XLM-RoBERTa with a fast tokenizer. All ways of a job take turns in
one process. A way is timed only if its results are right: in float32 to rounding, otherwise as near as its form of
weights comes. It takes five minutes on two cores.
"""

import argparse
import copy
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

import erniem_fast
from bench import INTERRUPTED
from bench.difference import difference
from bench.model import faces
from bench.model.figures import Contender, EncodeJob, EncodeRun
from bench.model.options import add_common_options, checkpoint_folder, positive
from bench.model.quality import PREFIX, REAL_WEIGHTS
from bench.model.text import SENTENCE_WORDS, read_translations
from bench.parser import make_parser
from bench.record import begin, stem_of, write
from bench.report.sentence_transformers import markdown, plot
from bench.timing import quartiles, take_turns

SEED = 0
BATCH_SIZE = 32  # sentence-transformers' default
FORMS = (None, "packed", "bfloat16", "int8")
# The largest difference over the root mean square of the stock model's results. That of 8 bits is what
# `python -m bench quality` finds small enough to retrieve as well; more would be a mistake.
LARGEST = {None: 1e-4, "packed": 1e-4, "bfloat16": 0.2, "int8": 0.5}


class Job(NamedTuple):
    """What is computed.

    Attributes:
        name: as reports call it.
        kind: of model, one of `faces.LOADERS`.
        items: texts or pairs.
    """

    name: str
    kind: str
    items: list


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run = measure(arguments)
    except ValueError as error:
        sys.exit(f"python -m bench encode: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    stem = stem_of(run, arguments.output)
    write(run, markdown(run), stem)
    plot(run, stem.with_suffix(".png"))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("encode", __doc__)
    add_model_option(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--texts", type=positive, default=256, metavar="N", help="that are encoded (default: 256)")
    group.add_argument("--pairs", type=positive, default=100, metavar="N", help="that are ranked (default: 100)")
    group.add_argument("--rounds", type=positive, default=7, metavar="N", help="timed rounds (default: 7)")
    add_common_options(group)
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=checkpoint_folder,
        default=str(REAL_WEIGHTS),
        metavar="DIR",
        help="folder of an ERNIE-M checkpoint with its tokenizer (default: that which `make quality` makes)",
    )


def measure(arguments: argparse.Namespace) -> EncodeRun:
    """All jobs, with all ways that run here."""
    run = EncodeRun(**vars(begin("encode", arguments)), absent=[], jobs=[])
    torch.set_num_threads(run.settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        faces.save(arguments.model, pathlib.Path(folder))
        for kind, load in faces.LOADERS.items():
            stock = load(pathlib.Path(folder, kind))
            models = optimised(stock, run.absent)
            for job in make_jobs(arguments.texts, arguments.pairs):
                if job.kind == kind:
                    print(job.name, file=sys.stderr)
                    run.jobs.append(compare(job, stock, ways(job, stock, models), arguments.rounds))
    run.absent.append(openvino_objection())
    run.absent = list(dict.fromkeys(filter(None, run.absent)))
    return run


def make_jobs(texts: int, pairs: int) -> list[Job]:
    """The jobs, on sentences of all languages in the data: menu labels too, as queries are short and texts long."""
    rows = read_translations()
    chosen = random.Random(SEED)
    sentences = [row.translation for row in rows if len(row.english.split()) >= SENTENCE_WORDS]
    every = [PREFIX + row.translation for row in chosen.choices(rows, k=texts // 2)]
    every += [PREFIX + text for text in chosen.choices(sentences, k=texts - len(every))]
    documents = [" ".join(chosen.choices(sentences, k=chosen.randint(1, 6))) for _ in range(pairs)]
    query = PREFIX + sentences[0]
    return [
        Job("ST encode, mixed languages, sorted as ST sorts", "bare", every),
        Job("single query", "bare", [query]),
        Job(f"reranker, {pairs} pairs", "reranker", [(sentences[0], document) for document in documents]),
    ]


def optimised(stock, absent: list[str]) -> dict[str | None, object]:
    """Copies of the stock model with each form of weights that this machine serves."""
    models = {}
    for form in FORMS:
        try:
            models[form] = erniem_fast.optimize(copy.deepcopy(stock), weights=form)
        except ValueError as error:
            absent.append(f"erniem_fast {form}: {error}")
    return models


def ways(job: Job, stock, models: dict[str | None, object]) -> dict[str, tuple[str | None, Callable[[], np.ndarray]]]:
    """For each way its form of weights and the call, the stock model's first."""

    def library(model):
        run = model.predict if job.kind == "reranker" else model.encode
        return lambda: run(job.items, batch_size=BATCH_SIZE, show_progress_bar=False)

    def ours(model):
        run = erniem_fast.score if job.kind == "reranker" else erniem_fast.embed
        return lambda: run(model, job.items, show_progress_bar=False)

    found = {"stock": (None, library(stock))}
    name, own = ("predict", "score") if job.kind == "reranker" else ("encode", "embed")
    for form, model in models.items():
        found[f"{name}, {form or 'float32'}"] = (form, library(model))
        if form in (None, "int8"):
            found[f"erniem_fast.{own}, {form or 'float32'}"] = (form, ours(model))
    return found


def compare(job: Job, stock, calls: dict, rounds: int) -> EncodeJob:
    """Checks what each way returns, and times them in turn.

    Raises:
        ValueError: results are wrong.
    """
    reference = torch.from_numpy(calls["stock"][1]())
    off = {}
    for name, (form, call) in calls.items():
        off[name] = difference(torch.from_numpy(call()), reference)
        if not off[name] <= LARGEST[form]:
            raise ValueError(f"{job.name}: {name} is off by {off[name]:.2g} of the results' root mean square")
    taken = take_turns([call for _, call in calls.values()], rounds, torch.device("cpu"), warm_up=1)
    seconds = [[each.seconds for each in one] for one in taken]
    lengths = tokens_of(stock, job.items)
    return EncodeJob(
        name=job.name,
        items=len(job.items),
        tokens=sum(lengths),
        fill=fill(job.items, lengths),
        contenders=[
            Contender(name, quartiles(own), quartiles(np.divide(seconds[0], own)), off[name])
            for name, own in zip(calls, seconds, strict=True)
        ],
    )


def tokens_of(model, items: list) -> list[int]:
    return [len(ids) for ids in model.tokenizer(items, truncation=True)["input_ids"]]


def fill(items: Sequence, lengths: Sequence[int]) -> float:
    """The share of real tokens in sentence-transformers' batches: it sorts by characters, the longest first."""
    characters = [len(item) if isinstance(item, str) else sum(map(len, item)) for item in items]
    order = np.argsort([-count for count in characters])
    batches = [
        [lengths[index] for index in order[start : start + BATCH_SIZE]] for start in range(0, len(order), BATCH_SIZE)
    ]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def openvino_objection() -> str | None:
    """Why sentence-transformers' OpenVINO backend takes no part."""
    try:
        import optimum.intel  # noqa: F401
    except ImportError as error:
        return f"OpenVINO int8: sentence-transformers' backend needs optimum-intel, which does not import ({error})"
    return "OpenVINO int8: optimum-intel is installed, but this benchmark has no such way yet"
