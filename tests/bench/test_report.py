"""What reports, pictures and the README say of a run."""

import dataclasses
import json
import re
import shutil

import matplotlib
import pytest
from runs import job, measured, run_of

from bench import RESULTS
from bench.kernels.figures import KernelRun
from bench.model.figures import Breakdown, ModelRun, PeerQuality, QualityRun, Retrieval
from bench.model.rivals import OURS_NAMES
from bench.model.summary import summarise
from bench.record import Run, read
from bench.report import breakdown, draw, kernels, readme
from bench.report.bars import plot_bars, plot_panels
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
    plot_panels(run, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


AMD = RESULTS / "amd-epyc-zen-5-2-cores"


def said_of_encode(run):
    many, one = run.jobs[0], run.jobs[1]
    rounded = next(each for each in many.contenders if each.name == "encode, int8")
    return [
        "ST encode, mixed languages, sorted as ST sorts",
        f"256 rows, {many.tokens:,} tokens; batches {many.fill:.0%} full",
        f"1 row, {one.tokens} tokens",
        "stock, float32",
        "optimized, packed float32",
        "times as fast as stock",
        f"{rounded.speedup.median:.1f}x, {rounded.seconds.median * 1000:.0f} ms",
    ]


def said_of_lines(run):
    most = run.results[-1]
    rate, memory = most.lines / most.seconds[0], most.peak_memory / 2**20
    return [
        "multilingual-e5-small as XLM-RoBERTa after optimize, int8",
        f"{most.lines:,} lines by {most.way}",
        f"{rate:,.0f} per second, {memory:,.0f} MiB",
    ]


def said_of_extraction(run):
    padded, packed = run.contenders
    long = run.long_texts[-1]
    return [
        f"Six schemas: {run.rows} rows of prompt and text, 7% full if padded to 512",
        f"{padded.seconds.median:.1f} s",
        f"{packed.seconds.median:.1f} s, {packed.speedup.median:.1f}x as fast",
        f"{(long.peak_memory - long.loaded_memory) / 2**20:,.0f} MiB, {long.seconds:.1f} s",
    ]


def said_of_finetuning(run):
    return ["F1", "seed 2", f"{run.runs[0].examples:.3f}", f"{run.runs[0].results:.3f}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("encode-multilingual-e5-small-float32", said_of_encode),
        ("lines-multilingual-e5-small-float32", said_of_lines),
        ("extraction-base-float32", said_of_extraction),
        ("finetuning-multilingual-e5-small-float32", said_of_finetuning),
    ],
)
def test_small_pictures_say_what_was_measured(name, said, tmp_path):
    """As SVG, whose text can be read: bars and their figures, the fill and the precision."""
    kind, plot = draw.DRAWN[name.partition("-")[0]]
    run = read(kind, AMD / f"{name}.json")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(run, tmp_path / "picture.svg")
    written = re.findall(r">([^<>]+)</text>", (tmp_path / "picture.svg").read_text(encoding="utf-8"))
    assert [text for text in said(run) if text not in written] == []


def test_jobs_that_an_interruption_left_out_are_not_drawn(tmp_path):
    run = read(ModelRun, RESULTS / "nvidia-h200" / "throughput-base-bfloat16.json")
    assert [bool(job.peers[0].rounds) for job in run.jobs] == [True, True, False]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_bars(run, tmp_path / "picture.svg")
    written = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    expected = {"batch 256, real text": True, "2,516,170": True, "batch 1, real text": False, "not measured": False}
    assert {text: text in written for text in expected} == expected


def test_pictures_are_drawn_again_beside_their_results(tmp_path):
    names = ["lines-multilingual-e5-small-float32", "throughput-base-float32"]
    for name in names:
        shutil.copy(AMD / f"{name}.json", tmp_path)
    assert draw.main([str(tmp_path / f"{name}.json") for name in names]) == 0
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "sweep-bfloat16.json").write_text("{}")
    for path in ("sweep-bfloat16.json", f"{names[0]}.png", "missing.json"):
        with pytest.raises(SystemExit, match=f"{path} is not the JSON of a result that has pictures"):
            draw.main([str(tmp_path / path)])


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Copies of the README and of the page of benchmarks, which `readme.main` then rewrites."""
    for name, page in {"README": readme.README, "BENCHMARKS": readme.BENCHMARKS}.items():
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(readme, name, tmp_path / page.name)
    return tmp_path


def between(name, text):
    """What stands before, between and after the markers of a section."""
    before, rest = text.split(f"<!-- {name}: begin -->\n")
    return before, *rest.split(f"<!-- {name}: end -->")


def keep(folder, **runs):
    for name, run in runs.items():
        (folder / getattr(readme, name)).write_text(json.dumps(dataclasses.asdict(run)))


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (0.95, "**It is slower in 1 of 2 comparisons**, 0.90x at the worst, all of them in batches that are 95% full"),
        (0.997, "**It is slower in 1 of 2 comparisons**, 0.90x at the worst, all of them in full batches."),
    ],
)
def test_where_it_is_slower(fill, words):
    assert readme._behind([dataclasses.replace(job("32 x text", old=0.9, older=1.1), fill=fill)]).startswith(words)


def test_the_pages_are_rewritten_between_their_markers(pages):
    old = (pages / "README.md").read_text(encoding="utf-8")
    # "XLM-R, optimize" runs on erniem_fast, so it must not count as a rival.
    first = job("32 x text", old=2.5, older=4.0, **{"XLM-R, optimize": 0.9})
    jobs = [first, job("1 x text", old=1.25), job("32 x sorted", old=0.9)]
    keep(pages, RIVALS=run_of(*jobs), TRAINING=run_of(job("4 x fixed:9", old=0.8)))
    readme.main([str(pages)])
    new, page = ((pages / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks.md"))
    (before, _, after), (start, section, end) = between("speed", old), between("speed", new)
    assert (before, between("rounded", after)[0]) == (start, between("rounded", end)[0])
    words = " ".join(section.split())
    assert "than the fastest of 1 others: 32 sentences as they come, 45% full, 2.50x (old); one sentence" in words
    assert "**It is slower in 2 of 5 comparisons**, 0.80x at the worst, all of them in batches that are 45%" in words
    assert "A step of training on 4 texts is 0.8 times as fast as in old" in words
    assert between("rounded", new)[1] == ""
    table = between("throughput", page)[1]
    assert (
        "| old             | 2.50x               | 1.25x              | 0.90x                 | 0.80x                 |"
        in table
    )
    assert "openvino 1, python 3.11; 2026-11-23" in table
    assert "**erniem_fast is slower** in 32 x sorted against old (0.90x); 4 x fixed:9 against old (0.80x)." in table
    assert str(pages) not in new + page
    assert (pages / readme.HEADLINE).read_bytes().startswith(b"\x89PNG")


def test_without_a_loss_the_readme_says_so(pages):
    keep(pages, RIVALS=run_of(job("32 x text", old=2.5)), TRAINING=run_of())
    assert "It is faster in all 1 comparisons." in " ".join(readme.speed(pages).split())


def test_the_pages_show_what_rounds_and_what_that_costs(tmp_path):
    exact = PeerQuality("erniem_fast", 1.0, 1.0, {"de": Retrieval(0.9, 0.8)})
    coarse = PeerQuality("old int8", 0.99876, 0.9, {"de": Retrieval(0.9, 0.7)})
    run = run_of(job("32 x text", old=2.5))
    head = {field.name: getattr(run, field.name) for field in dataclasses.fields(Run)}
    quality = QualityRun(**head, sentences=9, tokens=99, pairs={"de": 5}, absent=[], peers=[exact, coarse])
    rounds = run_of(job("32 x text", **{"old int8": 3.5}), job("1 x text", **{"old int8": 9.5}))
    keep(tmp_path, RIVALS=run, TRAINING=run_of(), ROUNDED=rounds, QUALITY=quality)
    (shared,) = readme.joined(run, rounds).jobs
    assert [peer.peer for peer in shared.peers] == ["erniem_fast", "old", "old int8"]
    page = readme.throughput(tmp_path).splitlines()
    assert [row[:2] for row in cells(page) if row[1].endswith(("x", "/s"))] == [
        ["erniem_fast", "1,000 tokens/s"],
        ["old", "2.50x"],
        ["old int8", "3.50x"],
    ]
    assert [line.partition("]")[2] for line in page if line.startswith("!")] == [
        f"(../{tmp_path.name}/rivals-base-float32.png)",
        f"(../{tmp_path.name}/rounded-base-float32.png)",
        f"(../{tmp_path.name}/quality-multilingual-e5-small-float32.png)",
    ]
    row = ["old int8", "1,000", "-", "0.9988", "0.9000", "80.0 %", "-5.0", "de -5.0"]
    assert row in cells(readme.rounded(tmp_path).splitlines())


def cells(lines):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


PLOTS = {"kernels-float32": (KernelRun, kernels.plot), "breakdown-base-float32": (Breakdown, breakdown.plot)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kernels-float32", "these tensors fit into the caches, and those of the measured copy do not"),
        ("breakdown-base-float32", "A copy also fetches what it overwrites"),
    ],
)
@pytest.mark.parametrize("is_beaten", [True, False])
def test_a_floor_that_is_beaten_explains_itself(name, words, is_beaten, tmp_path):
    kind, plot = PLOTS[name]
    run = read(kind, RESULTS / f"intel-xeon-processor-2-cores/{name}.json")
    if kind is KernelRun:
        factor = 1e3 if is_beaten else 1e-3
        run.results = [dataclasses.replace(each, floor=each.floor * factor) for each in run.results]
    elif not is_beaten:  # AdamW is below its floor there
        run.training = [dataclasses.replace(each, ratio=each.ratio and max(each.ratio, 1)) for each in run.training]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(run, tmp_path / "picture.svg")
    assert (words in (tmp_path / "picture.svg").read_text(encoding="utf-8")) == is_beaten


def test_a_readme_without_results_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no rivals-base-float32\.json and no training-base-float32\.json"):
        readme.main([str(tmp_path)])
