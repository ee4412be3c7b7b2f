"""What every result begins with, and where it is kept."""

import datetime
import json

from bench import ROOT
from bench.machine import available_cores, describe, slug

RESULTS = ROOT / "bench/results"


def begin(name, arguments):
    """The head of a result: its name, date, machine and settings.

    Args:
        name: of what is measured.
        arguments: what `add_run_options` asks for.
    """
    return {
        "name": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(arguments.device),
        "settings": {
            "model": arguments.model.resolve().name if arguments.model else f"{arguments.size}, random weights",
            "dtype": arguments.dtype,
            "device": arguments.device,
            "threads": arguments.threads or available_cores(),
        },
    }


def write(run, text, output):
    """Print `text` and write it as Markdown beside the JSON of `run`; returns their path without the ending.

    Args:
        run: what `begin` began.
        text: its report.
        output: the folder; None stands for that of this machine.
    """
    output = output or RESULTS / slug(run["machine"])
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"{run['name']}-{run['settings']['model'].partition(',')[0]}-{run['settings']['dtype']}"
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{stem}.json, .md and .png hold this, the pictures and every round")
    return stem
