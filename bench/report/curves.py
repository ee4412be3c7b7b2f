"""The JSON of a run against many rivals as pictures: a panel of bars for every job, and rates as curves."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.report.bars import COLOURS, OTHERS, OURS, label
from bench.report.model import title

COLUMNS = 4
MARKERS = "osD^vPX*"
INT8 = " int8"  # how the name of a rival ends that rounds to 8 bits


def plot_panels(run, path):
    """Write the PNG `path`: for every job a panel of bars, the fastest on top; ours stands out."""
    jobs = run["jobs"]
    columns = min(COLUMNS, len(jobs))
    rows = -(-len(jobs) // columns)
    height = 1.2 + rows * (0.9 + 0.24 * len(jobs[0]["peers"]))
    figure = Figure(figsize=(max(4 * columns, 9), height), dpi=130, layout="constrained")
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i < len(jobs):
            _draw_panel(axis, jobs[i])
        else:
            axis.set_axis_off()
    figure.suptitle(
        f"{title(run)}\nreal tokens per second: median, quartiles, and how much faster erniem_fast is (int8 than int8)"
    )
    figure.savefig(path)


def _draw_panel(axis, job):
    ours = job["peers"][0]["peer"]
    peers = sorted(job["peers"], key=lambda peer: -peer["tokens_per_second"]["median"] if peer["rounds"] else 0)
    rates = [peer["tokens_per_second"] or {"q1": 0, "median": 0, "q3": 0} for peer in peers]
    whiskers = [[rate["median"] - rate["q1"] for rate in rates], [rate["q3"] - rate["median"] for rate in rates]]
    colours = [OURS if peer["peer"].removesuffix(INT8) == ours else OTHERS for peer in peers]
    medians = [rate["median"] for rate in rates]
    bars = axis.barh([peer["peer"] for peer in peers], medians, xerr=whiskers, color=colours, error_kw={"capsize": 2})
    texts = [_figures(peer) for peer in peers]
    axis.bar_label(bars, texts, padding=5, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.7 * max(*medians, 1))  # room for the figures beside the bars
    axis.set_title(label(job), fontsize=10)
    axis.xaxis.set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _figures(peer):
    if not peer["rounds"]:
        return "not measured"
    ratio = f"  ({peer['speedup']['median']:.2f}x)" if peer["speedup"] else ""
    return f"{peer['tokens_per_second']['median']:,.0f}{ratio}"


def plot_curves(run, path):
    """Write the PNG `path`: rates by batch size, by length and by fill, a curve for every peer."""
    figure = Figure(figsize=(16, 5.5), dpi=130, layout="constrained")
    by_batch, by_length, by_fill = figure.subplots(1, 3, sharey=True)
    jobs = run["jobs"]
    _draw_curves(by_batch, [(job["batch_size"], job) for job in jobs if job["lengths"] == "text"])
    by_batch.set(xlabel="rows in a batch of real text", ylabel="real tokens per second", title="By batch size")
    fixed = [(int(job["lengths"].removeprefix("fixed:")), job) for job in jobs if job["lengths"].startswith("fixed:")]
    _draw_curves(by_length, fixed)
    by_length.set(xlabel="tokens in every row, no padding", title="By length")
    _draw_curves(by_fill, [(100 * job["fill"], job) for job in jobs if job["batch_size"] == 32])
    by_fill.set(xlabel="real tokens in a batch of 32, %", title="By fill")
    for axis in (by_batch, by_length):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted({x for line in axis.lines for x in line.get_xdata()})))
    for axis in (by_batch, by_length, by_fill):
        axis.xaxis.set_major_formatter("{x:.0f}")
    by_batch.yaxis.set_major_formatter("{x:,.0f}")
    by_batch.yaxis.set_major_locator(FixedLocator([n * 10**k for k in range(7) for n in (1, 2, 5)]))
    figure.suptitle(title(run), fontweight="bold")
    figure.legend(*by_batch.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _draw_curves(axis, points):
    points = sorted(points, key=lambda point: point[0])
    names = [peer["peer"] for peer in points[0][1]["peers"]] if points else []
    for i, name in enumerate(names):
        measured = [(x, job["peers"][i]) for x, job in points if job["peers"][i]["rounds"]]
        rates = [peer["tokens_per_second"]["median"] for _, peer in measured]
        # Rounded to 8 bits, a rival keeps its colour and is dashed.
        full = names.index(name.removesuffix(INT8)) if name.removesuffix(INT8) in names else i
        style = {"color": COLOURS[full % len(COLOURS)], "marker": MARKERS[full % len(MARKERS)], "label": name}
        style |= {"linewidth": 3, "zorder": 3} if i == 0 else {"linewidth": 1.2}
        axis.plot([x for x, _ in measured], rates, "--" if name.endswith(INT8) else "-", **style)
    axis.set_yscale("log", base=2)
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
