"""examples/finetune_classification.py: rates by layer, results by language, and going on after a kill."""

import csv

import pytest
import torch

from erniem_fast import ErnieMForSequenceClassification
from tests.examples.scripts import import_example
from tests.golden import cases
from tests.pretraining.parallel import PAIRS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose label tells whether the first sentence starts with a letter of the alphabet's first half."""
    path = tmp_path_factory.mktemp("classification") / "pairs.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=None, quotechar=None)
        writer.writerow(["language", "premise", "hypothesis", "label"])
        for index, pair in enumerate(PAIRS[:48]):
            writer.writerow([("en", "xx")[index % 2], pair.source, pair.source, ("low", "high")[pair.source[0] > "M"]])
    return path


def command(data, folder, **options):
    numbers = {"epochs": 4, "batch-size": 8, "lr": 3e-3, "max-length": 48, "save-every": 5, **options}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    files = ["--model", str(cases.TINY), "--train", str(data), "--test", str(data), "--output", str(folder)]
    return [*files, "--cpu", *words]


def test_rates_and_results(data, tmp_path, capsys):
    """It learns the rows of one language by heart; the table and the model are written."""
    example = import_example("finetune_classification")
    example.main([*command(data, tmp_path, epochs=12, accumulate=2), "--train-languages", "en"])
    rows = [line.split("\t") for line in (tmp_path / "accuracy.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["language", "en", "xx", "mean"]
    assert float(rows[1][1]) > 0.9
    assert "\n".join("\t".join(row) for row in rows) in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    model = ErnieMForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.label2id == {"high": 0, "low": 1}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(data, tmp_path, monkeypatch):
    """To the same weights, to the bit."""
    example = import_example("finetune_classification")
    example.main(command(data, tmp_path / "whole"))
    step = torch.optim.AdamW.step
    steps = []

    def die(*arguments, **options):
        steps.append(1)
        if len(steps) == 13:
            raise Killed
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die)
        with pytest.raises(Killed):
            example.main(command(data, tmp_path / "parts"))
    example.main(command(data, tmp_path / "parts"))
    files = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_is_refused(data, tmp_path):
    example = import_example("finetune_classification")
    with pytest.raises(SystemExit, match="no rows in de"):
        example.main([*command(data, tmp_path), "--train-languages", "de"])
    with pytest.raises(SystemExit, match="--batch-size 8 is no multiple of 1 x --accumulate"):
        example.main(command(data, tmp_path, accumulate=3))
    data = tmp_path / "bad.tsv"
    data.write_text("language\tpremise\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the columns hypothesis, label"):
        example.main(command(data, tmp_path))
