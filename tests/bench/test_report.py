"""What reports, pictures and the README say of a run."""

import dataclasses
import json

import pytest
from runs import job, measured, run_of

from bench import ROOT
from bench.model.figures import PeerQuality, QualityRun, Retrieval
from bench.model.rivals import OURS_NAMES
from bench.model.summary import summarise
from bench.record import Run
from bench.report import readme
from bench.report.bars import plot_panels
from bench.report.curves import plot_curves
from bench.report.model import losses, markdown, overview
from bench.report.parts import COLOURS, colours_of, form


def test_table_shows_rates_ratios_and_losses():
    measurements = [measured("erniem_fast", [[1.0, 1.0]] * 3, 2**30), measured("old", [[0.75, 0.75]] * 3, 2**31)]
    text = markdown(run_of(*summarise(measurements, OURS_NAMES)))
    assert "Medians and quartiles of 3 rounds of up to 4 rows" in text
    assert "| 2 x text, 83% full | erniem_fast | 15 (15-15) " in text
    assert (
        "| old         | 20 (20-20)                | 2.7    | 750 (750)                   | 0.75x (0.75-0.75)" in text
    )
    assert "| 2,048 MiB   | 0.50x " in text
    assert "**erniem_fast is slower** in 2 x text against old (0.75x)." in text


def test_a_ratio_that_rounds_to_one_is_no_loss():
    measurements = [measured("erniem_fast", [[1.004]] * 3), measured("old", [[1.0]] * 3)]
    assert "slower" not in markdown(run_of(*summarise(measurements, OURS_NAMES)))


def test_a_busy_machine_is_told():
    steady, unsteady = measured("erniem_fast", [[1.0], [1.0], [1.1]]), measured("old", [[1.0], [1.0], [1.4]])
    text = markdown(run_of(*summarise([steady, unsteady], OURS_NAMES)))
    assert "**Unsteady**: the quartiles lie more than 10% of the median apart in 2 x text of old." in text


def test_overview_has_a_row_for_every_peer_and_a_dash_for_what_was_not_measured():
    jobs = [job("32 x text", old=2.123, dead=None), job("1 x text", new=0.9)]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in overview(run_of(*jobs)).splitlines()[2:]] == [
        ["erniem_fast", "1,000 tokens/s", "1,000 tokens/s", "-", "2,048 MiB", "1.0 s"],
        ["old", "2.12x", "-", "-", "-", "1.5 s"],
        ["dead", "-", "-", "-", "-", "-"],
        ["new", "-", "0.90x", "-", "-", "-"],
    ]
    assert losses(jobs) == ["**erniem_fast is slower** in 1 x text against new (0.90x)."]


def test_the_form_of_a_peer_s_weights_ends_its_name():
    names = ("erniem_fast packed", "OpenVINO static int8", "transformers 4.57.6", "erniem_fast")
    assert [form(name) for name in names] == [
        ("erniem_fast", "packed"),
        ("OpenVINO static", "int8"),
        ("transformers 4.57.6", None),
        ("erniem_fast", None),
    ]


def test_the_first_peer_s_colour_is_its_own_and_a_peer_keeps_its_in_every_form():
    rivals = [f"rival {number}" for number in range(9)]
    colours = colours_of(["erniem_fast", *(f"{name} {weights}" for name in rivals for weights in ("bfloat16", "int8"))])
    assert list(colours) == ["erniem_fast", *rivals]
    assert len(set(colours.values())) == len(COLOURS)
    assert list(colours.values()).count(colours["erniem_fast"]) == 1


def test_pictures_leave_out_what_was_not_measured(tmp_path):
    run = run_of(*(job(name, old=2.0, dead=None) for name in ("32 x text", "1 x text", "32 x fixed:9")))
    for draw in (plot_panels, plot_curves):
        draw(run, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()


def test_the_readme_is_rewritten_between_its_markers(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text(text, encoding="utf-8")
    for name, jobs in ((readme.RIVALS, [job("32 x text", old=2.5)]), (readme.TRAINING, [job("4 x fixed:9", old=0.8)])):
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(run_of(*jobs))))
    readme.main([str(tmp_path)])
    new = readme.README.read_text(encoding="utf-8")
    before, rest = new.split(readme.BEGIN)
    section, after = rest.split(readme.END)
    assert (before, after) == (text.split(readme.BEGIN)[0], text.split(readme.END)[1])
    assert "| old         | 2.50x               | 0.80x                 |" in section
    assert "openvino 1, python 3.11; 2026-11-23" in section
    assert "What rounding costs" not in section
    assert "**erniem_fast is slower** in 4 x fixed:9 against old (0.80x)." in section
    assert str(tmp_path) not in section


def test_the_readme_shows_what_rounds_and_what_that_costs(tmp_path):
    exact = PeerQuality("erniem_fast", 1.0, 1.0, {"de": Retrieval(0.9, 0.8)})
    rounded = PeerQuality("old int8", 0.99876, 0.9, {"de": Retrieval(0.9, 0.7)})
    run = run_of(job("32 x text", old=2.5))
    head = {field.name: getattr(run, field.name) for field in dataclasses.fields(Run)}
    quality = QualityRun(**head, sentences=9, tokens=99, pairs={"de": 5}, absent=[], peers=[exact, rounded])
    written = {
        readme.RIVALS: run,
        readme.TRAINING: run_of(),
        readme.ROUNDED: run_of(job("32 x text", **{"old int8": 3.5}), job("1 x text", **{"old int8": 9.5})),
        readme.QUALITY: quality,
    }
    for name, each in written.items():
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(each)))
    (shared,) = readme.joined(run, written[readme.ROUNDED]).jobs
    assert [peer.peer for peer in shared.peers] == ["erniem_fast", "old", "old int8"]
    lines = readme.section(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in cells if row[1].endswith(("x", "/s"))] == [
        ["erniem_fast", "1,000 tokens/s"],
        ["old", "2.50x"],
        ["old int8", "3.50x"],
    ]
    assert ["old int8", "0.9988", "0.9000", "80.0 %", "-5.0", "de -5.0"] in cells
    assert [line.partition("]")[2] for line in lines if line.startswith("!")] == [
        f"({tmp_path.name}/rivals-base-float32-curves.png)",
        f"({tmp_path.name}/rounded-base-float32-curves.png)",
        f"({tmp_path.name}/quality-multilingual-e5-small-float32.png)",
    ]


def test_a_readme_without_results_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no rivals-base-float32\.json and no training-base-float32\.json"):
        readme.main([str(tmp_path)])
