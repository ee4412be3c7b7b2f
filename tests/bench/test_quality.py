"""What rounding costs: whole runs on a few sentences, and what the report says of them."""

import numpy as np
import pytest
from runs import TINY

from bench import ROOT
from bench.machine import Machine
from bench.model import quality
from bench.model.figures import PeerQuality, QualityRun, Retrieval
from bench.model.rivals import OURS, rivals
from bench.model.text import Translation, read_translations
from bench.model.workers import Peer
from bench.record import Settings, read
from bench.report.quality import markdown

ROWS = [
    Translation("de", "Password", "Passwort"),
    Translation("de", "Log in again", "Erneut anmelden"),
    Translation("fr", "Password", "Mot de passe"),
    Translation("fr", "User", "Utilisateur"),
    Translation("fr", "Log in again", "Se connecter à nouveau"),
]


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Runs the command on ROWS and the tiny checkpoint with given peers; returns its exit code and its figures."""
    monkeypatch.setattr(quality, "read_translations", lambda: ROWS)

    def run(*peers):
        code = quality.main(["--model", str(TINY), "--threads", "1", "--output", str(tmp_path)], peers)
        assert (tmp_path / "quality-tiny-float32.png").read_bytes().startswith(b"\x89PNG")
        return code, read(QualityRun, tmp_path / "quality-tiny-float32.json")

    return run


def test_a_peer_is_compared_with_the_first_in_every_language(compare, fake):
    code, run = compare(OURS, fake("constant"))
    assert code == 0
    assert (run.sentences, run.pairs) == (8, {"de": 2, "fr": 3})
    ours, constant = run.peers
    assert ours.least_cosine == pytest.approx(1, abs=1e-12)
    assert ours.retrieval["de"].mean > 1 / 2
    # One feature that is always 1: every sentence is as near as any other.
    assert constant.retrieval == {"de": Retrieval(1 / 2, 1 / 2), "fr": Retrieval(1 / 3, 1 / 3)}


def test_who_cannot_run_is_absent_with_the_reason(compare, fake):
    missing = Peer("homeless", OURS.command, ROOT / ".venv-nowhere/bin/python")
    code, run = compare(fake("erniem_fast"), missing, fake("old", value=-2.0))
    assert code == 0
    assert [text.partition(": no ")[0] for text in run.absent] == ["homeless: its environment is missing"]
    assert [(peer.peer, peer.mean_cosine) for peer in run.peers] == [("erniem_fast", 1.0), ("old", -1.0)]


def test_without_its_reference_there_is_no_run(compare):
    with pytest.raises(SystemExit, match=r"python -m bench quality: its environment is missing"):
        compare(Peer("homeless", OURS.command, ROOT / ".venv-nowhere/bin/python"))


def test_batches_hold_every_sentence_once_by_length_with_its_prefix():
    texts, lengths, batches = quality.make_batches(TINY, ROWS)
    assert sorted(texts) == sorted({text for row in ROWS for text in (row.english, row.translation)})
    assert lengths.tolist() == sorted(lengths)
    (batch,) = batches
    assert [sum(mask) for mask in batch["attention_mask"]] == lengths.tolist()
    starts = {tuple(row[:3]) for row in batch["input_ids"]}
    assert len(starts) == 1  # [CLS] and the pieces of "query: "


def test_the_sentences_of_34_languages_are_read():
    languages = quality.group(read_translations())
    assert len(languages) == 34
    assert sum(map(len, languages.values())) == 7974
    assert languages["de"][0] == ("(does not exist)", "(existiert nicht)")


def test_all_that_rounds_is_compared():
    reference, *others = rivals("rounded", "cpu", "float32")
    assert reference is OURS
    assert {peer.weights for peer in others} == {"bfloat16", "int8"}
    assert {"erniem_fast int8", "erniem_fast bfloat16", "ONNX Runtime int8"} <= {peer.name for peer in others}


def test_the_report_names_the_language_that_suffers_most():
    exact = PeerQuality("erniem_fast", 1.0, 1.0, {"de": Retrieval(0.9, 0.8), "zh": Retrieval(0.6, 0.7)})
    rounded = PeerQuality("old int8", 0.99876, 0.9, {"de": Retrieval(0.9, 0.82), "zh": Retrieval(0.5, 0.6)})
    run = QualityRun(
        name="quality",
        date="2026-11-26T10:00:00+00:00",
        machine=Machine("A CPU", 2, "AVX2", 24, None, "Linux"),
        settings=Settings("e5", "float32", "cpu", 2),
        sentences=8216,
        tokens=127593,
        pairs={"de": 278, "zh": 292},
        absent=["late: out of luck"],
        peers=[exact, rounded],
    )
    text = markdown(run)
    assert "8,216 sentences (127,593 tokens) in 3 languages" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[2] == ["erniem_fast, float32", "", "", "75.0 %", "", ""]
    assert cells[3] == ["old int8", "0.9988", "0.9000", "70.5 %", "-4.5", "zh -10.0"]
    assert cells[-1] == ["zh", "292", "60.0 / 70.0", "-10.0"]
    assert "**Absent.** late: out of luck" in text
    assert rounded.differences(exact) == {"de": pytest.approx(1.0), "zh": pytest.approx(-10.0)}
    assert np.isclose(rounded.mean_retrieval, 0.705)
