"""The benchmarks of erniem_fast; `python -m bench COMMAND --help` lists the options of one."""

import argparse
import importlib
import sys

# A command's module is imported when the command runs: some set the environment before they import Triton.
COMMANDS = {
    "throughput": (
        "bench.model.throughput",
        "tokens per second and memory of the model, beside its rivals (make bench)",
    ),
    "everything": ("bench.model.everything", "every rival, training, ablations and the breakdown (make bench-all)"),
    "quality": (
        "bench.model.quality",
        "what rounding costs: embeddings and retrieval on real weights, by language (make quality)",
    ),
    "encode": (
        "bench.model.sentence_transformers",
        "models of sentence-transformers before and after optimize: encode, a reranker, a single query",
    ),
    "lines": ("bench.model.lines", "many lines to vectors: encode of sentence-transformers beside embed, and memory"),
    "extraction": (
        "bench.model.extraction",
        "extraction by schema: packed rows beside rows padded to 512 tokens, and long texts with their memory",
    ),
    "finetuning": (
        "bench.model.finetuning",
        "examples/finetune_extraction.py with a few seeds: F1 on templates that it was not trained on",
    ),
    "pretraining": (
        "bench.model.pretraining",
        "the objectives of pre-training on small models: the translations that they find, by language",
    ),
    "memory": ("bench.model.memory", "a training step with the head for masked words, beside the encoder alone"),
    "breakdown": ("bench.model.breakdown", "where the time of a forward and of a training step goes, op by op"),
    "kernels": ("bench.kernels.speed", "each op beside PyTorch's ways to do the same work, and beside its floor"),
    "sweep": ("bench.kernels.sweep", "ways to launch the Triton kernels, timed on a GPU beside the shipped ones"),
    "codegen": ("bench.kernels.codegen", "what the Triton kernels compile to for every architecture, without a GPU"),
    "gpu": ("bench.gpu.steps", "all that needs a GPU: verification, tests, kernels, throughput (make gpu)"),
    "newcomer": ("bench.newcomer", "a newcomer's first hour: from git clone to the first embedding, and to a picture"),
    "draw": ("bench.report.draw", "draws the pictures of kept results again, from their JSON"),
    "readme": ("bench.report.readme", "rewrites the README's table from the results of this machine (make readme)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names; returns its exit code."""
    lines = [f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...")
    arguments = parser.parse_args(argv or sys.argv[1:] or ["--help"])
    return importlib.import_module(COMMANDS[arguments.command][0]).main(arguments.options)


if __name__ == "__main__":
    sys.exit(main())
