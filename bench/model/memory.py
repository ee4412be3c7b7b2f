"""Memory of a training step: ErnieMForMaskedLM, whose logits would be the largest tensor, beside the encoder alone.

Each runs in a process of its own, on rows of 512 random tokens, 15 % of which are to be predicted. The exit code is 1
if the model takes more than 1.3 times as much as the encoder.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import torch

import erniem_fast
from bench import INTERRUPTED, ROOT
from bench.model.figures import MemoryFigures, MemoryRun
from bench.model.options import add_run_options, checkpoint, positive
from bench.parser import make_parser
from bench.peers import memory
from bench.record import begin, stem_of, write
from bench.report.memory import memory_markdown

CLASSES = ("ErnieMModel", "ErnieMForMaskedLM")
COLUMNS, MASKED, BOUND = 512, 0.15, 1.3


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code: 0, 1 where the bound is exceeded, or 130 after Ctrl-C."""
    parser = make_parser("memory", __doc__)
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="multiples of 512 (default: 8192)")
    add_run_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.tokens % COLUMNS:
        parser.error(f"--tokens {arguments.tokens} is no multiple of {COLUMNS}")
    try:
        run = measure(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    write(run, memory_markdown(run), stem_of(run, arguments.output))
    encoder, model = (each.peak_memory for each in run.results)
    return int(model > BOUND * encoder)


def measure(arguments: argparse.Namespace) -> MemoryRun:
    run = MemoryRun(**vars(begin("memory", arguments)), tokens=arguments.tokens, results=[])
    settings = run.settings
    with checkpoint(arguments) as folder:
        for name in CLASSES:
            print(f"a training step of {name}", file=sys.stderr)
            options = [name, folder, settings.dtype, settings.device, settings.threads, arguments.tokens]
            command = [sys.executable, "-m", "bench.model.memory", *map(str, options)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            run.results.append(MemoryFigures(name, *json.loads(done.stdout)))
    return run


def work(name: str, folder: str, dtype: str, device: str, threads: str, tokens: str) -> tuple[int, int]:
    """A training step in this process.

    Returns:
        Bytes before it, and at most during it.
    """
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model_class = getattr(erniem_fast, name)
    model = model_class.from_pretrained(pathlib.Path(folder), dtype=getattr(torch, dtype)).to(device).train()
    ids = torch.randint(4, model.config.vocab_size, (int(tokens) // COLUMNS, COLUMNS), device=device)
    labels = ids.masked_fill(torch.rand(ids.shape, device=device) >= MASKED, -100)
    _reset_peak(device)
    before = _peak(device)
    loss = model(ids, labels=labels).loss if name.endswith("MaskedLM") else model(ids).last_hidden_state.float().mean()
    loss.backward()
    return before, _peak(device)


def _reset_peak(device: str) -> None:
    if device == "cpu":
        memory.reset_peak()
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int:
    return memory.peak() if device == "cpu" else torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    print(json.dumps(work(*sys.argv[1:])))
