"""Results are read as they were written, those of older versions too."""

import json

import pytest

from bench import RESULTS
from bench.kernels.figures import KernelRun, SweepRun
from bench.model.figures import MemoryRun, ModelRun
from bench.newcomer import NewcomerRun
from bench.record import RENAMED, read, write
from bench.report import kernels, model
from bench.report.draw import DRAWN


def without_later(new, old):
    """`new` without the fields that were added since `old` was written: they are None."""
    if isinstance(new, dict):
        return {
            name: without_later(each, old.get(name)) for name, each in new.items() if name in old or each is not None
        }
    if isinstance(new, list):
        return [without_later(*each) for each in zip(new, old, strict=True)]
    return new


KINDS = {
    "memory": MemoryRun,
    "newcomer": NewcomerRun,
    "sweep": SweepRun,
    **{name: kind for name, (kind, _) in DRAWN.items()},
}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_results_that_are_kept_are_read_whole_and_written_alike(path, tmp_path):
    write(read(KINDS.get(path.stem.partition("-")[0], ModelRun), path), "", tmp_path / path.stem)
    old, new = (file.read_text(encoding="utf-8") for file in (path, tmp_path / path.name))
    for before, after in RENAMED.items():
        old = old.replace(f'"{before}"', f'"{after}"')
    assert without_later(json.loads(new), json.loads(old)) == json.loads(old)


def test_reports_of_what_was_read_are_those_of_what_was_measured(tmp_path):
    for kind, report, name in ((ModelRun, model, "rivals-base-float32"), (KernelRun, kernels, "kernels-float32")):
        (path,) = RESULTS.glob(f"intel-xeon-processor-2-cores/{name}.json")
        run = read(kind, path)
        write(run, "", tmp_path / name)
        again = read(kind, tmp_path / path.name)
        assert again == run
        assert report.markdown(again) == report.markdown(run)
