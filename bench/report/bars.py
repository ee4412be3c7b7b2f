"""The JSON of a run as a picture: rates and peak memory of every job."""

from matplotlib.figure import Figure

from bench.report.model import title

# Okabe and Ito's: safe for the colour-blind.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999"]
OURS, OTHERS = COLOURS[0], "#BBBBBB"
GAP = 0.6  # between the groups of bars, in bars


def plot(run, path):
    """Write the PNG `path`: one group of bars per job, one bar per peer, with quartiles and the ratio of ours to it."""
    jobs, names = run["jobs"], [peer["peer"] for peer in run["jobs"][0]["peers"]]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(jobs) * (len(names) + GAP)), dpi=150, layout="constrained")
    rates, memories = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for i, name in enumerate(names):
        peers = [job["peers"][i] for job in jobs]
        style = {"height": 0.9, "color": COLOURS[i % len(COLOURS)], "label": name}
        at = [j * (len(names) + GAP) + i for j in range(len(jobs))]
        _draw_rates(rates, at, peers, style)
        _draw_memories(memories, at, peers, style)
    middles = [j * (len(names) + GAP) + (len(names) - 1) / 2 for j in range(len(jobs))]
    rates.set_yticks(middles, [label(job) for job in jobs])
    rates.invert_yaxis()
    rates.set(xlabel="real tokens per second (bars: median, whiskers: quartiles)", title="Throughput: longer is better")
    memories.set(xlabel="peak memory while running, MiB", title="Memory: shorter is better")
    for axis in (rates, memories):
        axis.set_xlim(0, 1.55 * max(axis.get_xlim()[1], 1))  # room for the figures beside the bars
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(run), fontweight="bold")
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path)


def plot_breakdown(run, path):
    """Write the PNG `path`: for a forward and a step of training, what each op takes and what it would at the least."""
    figure = Figure(figsize=(12, 4.5), dpi=150, layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("forward", "training"), strict=True):
        rows = run[name][:-1]
        at = range(len(rows))
        measured, floors = ([(row[name] or 0) * 1e3 for row in rows] for name in ("seconds", "floor"))
        axis.barh(at, measured, color=COLOURS[0], label="measured")
        axis.barh(at, floors, height=0.4, color=COLOURS[1], label="floor of this machine")
        ratios = [f"{row['ratio']:.1f}x the floor" if row["ratio"] else "" for row in rows]
        texts = [f"{row['seconds'] * 1e3:,.0f} ms  {ratio}" for row, ratio in zip(rows, ratios, strict=True)]
        ends = axis.barh(at, list(map(max, measured, floors)), alpha=0)
        axis.bar_label(ends, texts, padding=6, fontsize=9)
        axis.set_yticks(at, [row["op"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * max(axis.get_xlim()[1], 1))  # room for the figures beside the bars
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="milliseconds", title=f"{name.capitalize()}: {run[name][-1]['seconds'] * 1e3:,.0f} ms")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Where the time goes: {title(run)}", fontweight="bold")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def label(job):
    """What a job is, in two short lines."""
    kinds = {"text": "real text", "sorted": "text by length", "modernbert": "ModernBERT's lengths"}
    kind = kinds.get(job["lengths"]) or f"{job['lengths'].removeprefix('fixed:')} tokens each"
    return f"{'training, ' * job['train']}batch {job['batch_size']}, {kind}\n({job['fill']:.0%} full)"


def _draw_rates(axis, at, peers, style):
    rates = [peer["tokens_per_second"] or {"q1": 0, "median": 0, "q3": 0} for peer in peers]
    whiskers = [[rate["median"] - rate["q1"] for rate in rates], [rate["q3"] - rate["median"] for rate in rates]]
    bars = axis.barh(at, [rate["median"] for rate in rates], xerr=whiskers, error_kw={"capsize": 2}, **style)
    ratios = [peer["speedup"] and peer["speedup"]["median"] for peer in peers]
    _write_figures(axis, bars, ratios)


def _draw_memories(axis, at, peers, style):
    bars = axis.barh(at, [(peer["peak_memory"] or 0) / 2**20 for peer in peers], **style)
    _write_figures(axis, bars, [peer["memory_ratio"] for peer in peers])


def _write_figures(axis, bars, ratios):
    """Beside each bar its length and, where there is one, the ratio of ours to it."""
    figures = [f"{length:,.0f}" if length else "not measured" for length in bars.datavalues]
    texts = [f"{text}  (ours: {ratio:.2f}x)" if ratio else text for text, ratio in zip(figures, ratios, strict=True)]
    axis.bar_label(bars, texts, padding=6, fontsize=9)
