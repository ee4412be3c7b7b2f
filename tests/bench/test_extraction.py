"""The benchmarks of extraction: the padded form, what is compared, and whole runs on the tiny checkpoint."""

import pytest
import torch
from runs import TINY

from bench.model import extraction, finetuning
from bench.model.figures import ExtractionRun, FineTuningRun
from bench.record import read


def test_the_padded_form_computes_the_packed_one_s_logits():
    """Of rows of 512 tokens; with one less they are others. In float64, because the padded rows sum 512 roundings."""
    model, tokenizer = extraction.load(TINY)
    padded = extraction.Padded(model.double())
    batch = tokenizer(["user"] * 2, ["Log in again, please", "Log out"], padding=True, return_tensors="pt")
    expected, found = model(**batch), padded(**batch)
    real = batch["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][real], expected[name][real], rtol=0, atol=1e-7)
    assert (padded.rows, padded.tokens) == (2, real.sum().item())
    model.config.uie_padded_length = 511
    assert (model(**batch).start_logits - expected.start_logits)[real].abs().max() > 1e-6


def test_only_the_same_spans_are_timed():
    one = {"text": "a", "start": 0, "end": 1, "probability": 0.9}
    nested = [{"x": [one | {"relations": {"y": [one]}}]}]
    assert len(extraction.spans(nested)) == 2
    assert extraction.difference(nested, nested) == 0
    moved = [{"x": [one | {"relations": {"y": [one | {"start": 3}]}}]}]
    for found, expected in ((nested, moved), (nested, [{"x": [one]}]), ([], [])):
        with pytest.raises(ValueError, match="spans that the padded rows have"):
            extraction.difference(found, expected)
    with pytest.raises(ValueError, match=r"probabilities differ by 0\.01"):
        extraction.difference(nested, [{"x": [one | {"relations": {"y": [one | {"probability": 0.91}]}}]}])


def test_long_texts_have_the_characters_that_were_asked_for():
    assert [len(extraction.long_text(count)) for count in (10, 999, 200_001)] == [10, 999, 200_001]
    assert extraction.long_text(2000).startswith(extraction.sentences("zh")[0] + "\n" + extraction.sentences("en")[0])


def test_a_run(tmp_path):
    options = ["--texts", "2", "--rounds", "1", "--characters", "3000", "--threads", "1"]
    assert extraction.main(["--model", str(TINY), *options, "--output", str(tmp_path)]) == 0
    run = read(ExtractionRun, tmp_path / "extraction-tiny-float32.json")
    assert run.rows >= 2 * (1 + 2 + 1) * 2  # every name of the top level about each text, and relations
    assert run.spans > 0
    padded, packed = run.contenders
    assert (padded.difference, padded.speedup.median) == (0, 1)
    assert packed.difference < extraction.LARGEST
    (long,) = run.long_texts
    assert (long.characters, long.seconds > 0) == (3000, True)
    assert long.peak_memory >= long.loaded_memory > 2**27
    assert "times as fast as padded" in (tmp_path / "extraction-tiny-float32.md").read_text()
    assert (tmp_path / "extraction-tiny-float32.png").exists()


def test_fine_tuning(tmp_path):
    options = ["--model", str(TINY), "--texts", "4", "--seeds", "2", "--threads", "1", "--output", str(tmp_path)]
    assert finetuning.main(options) == 0
    run = read(FineTuningRun, tmp_path / "finetuning-tiny-float32.json")
    assert [each.seed for each in run.runs] == [0, 1]
    assert all(0 <= each.results <= 1 and each.seconds > 0 for each in run.runs)
    assert run.options["texts"] == 4
    assert "| seed |" in (tmp_path / "finetuning-tiny-float32.md").read_text()
    assert (tmp_path / "finetuning-tiny-float32.png").exists()
