"""What rounding costs, in Markdown and as a picture."""

import pathlib

from matplotlib.figure import Figure

from bench.model.figures import PeerQuality, QualityRun
from bench.report.parts import COLOURS, form, table, title

COLUMNS = ("mean cosine", "least cosine", "retrieval", "difference", "worst language")
SPREAD = 0.6  # of the distance between two peers
OTHERS = "#999999"
LEFT = {"ha": "right", "va": "center", "fontsize": 8}


def markdown(run: QualityRun) -> str:
    """The whole report: how it was measured, a row for every peer, a row for every language, and who is missing."""
    language, pairs = min(run.pairs.items(), key=lambda each: each[1])
    method = (
        f"{run.sentences:,} sentences ({run.tokens:,} tokens) in {len(run.pairs) + 1} languages, each as the mean over"
        " its tokens, at length 1. Cosine: between a sentence's embedding and that of"
        f" {run.peers[0].peer} in float32. Retrieval: how often the nearest sentence of the other language is the"
        " translation, English to each language and back, in %; differences to float32 in points, of which one more"
        f" miss makes {50 / pairs:.1f} in {language}, where there are {pairs} pairs. {run.date[:10]}."
    )
    absent = [f"**Absent.** {text}" for text in run.absent]
    parts = [f"### What rounding costs: {title(run)}", method, overview(run), _by_language(run), *absent]
    return "\n\n".join(parts) + "\n"


def overview(run: QualityRun) -> str:
    """A row for every peer: cosines, retrieval on average, and the language that suffers most."""
    rows = [[_name(run, peer), *cells(peer, run.peers[0])] for peer in run.peers]
    return table(["", *COLUMNS], rows)


def _name(run, peer):
    return f"{peer.peer}, {run.settings.dtype}" if peer is run.peers[0] else peer.peer


def cells(peer: PeerQuality, reference: PeerQuality) -> list[str]:
    """The figures of a peer, as `COLUMNS` names them."""
    retrieval = f"{100 * peer.mean_retrieval:.1f} %"
    if peer is reference:
        return ["", "", retrieval, "", ""]
    differences = peer.differences(reference)
    worst = min(differences, key=differences.get)
    return [
        f"{peer.mean_cosine:.4f}",
        f"{peer.least_cosine:.4f}",
        retrieval,
        _points(100 * (peer.mean_retrieval - reference.mean_retrieval)),
        f"{worst} {_points(differences[worst])}",
    ]


def _points(difference):
    return f"{round(difference, 1) + 0.0:+.1f}"  # minus zero plus zero is zero


def _by_language(run):
    reference, *others = run.peers
    differences = [peer.differences(reference) for peer in others]
    rows = [
        [
            language,
            str(run.pairs[language]),
            f"{100 * each.from_english:.1f} / {100 * each.to_english:.1f}",
            *(_points(one[language]) for one in differences),
        ]
        for language, each in reference.retrieval.items()
    ]
    return table(["", "pairs", "from / to English, float32", *(peer.peer for peer in others)], rows)


def plot(run: QualityRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: for every peer, how much better or worse than float32 it retrieves in each language."""
    reference, *others = run.peers
    figure = Figure(figsize=(12, 1.9 + 0.5 * len(others)), dpi=110, layout="constrained")
    axis = figure.subplots()
    names = list(reference.retrieval)
    for row, peer in enumerate(others):
        differences = peer.differences(reference)
        ours = form(peer.peer)[0] == reference.peer
        # Languages whose points are equal stand one above the other.
        at = [row + SPREAD * ((place + 0.5) / len(names) - 0.5) for place in range(len(names))]
        axis.scatter([differences[name] for name in names], at, s=14, color=COLOURS[0] if ours else OTHERS)
        mean, worst = 100 * (peer.mean_retrieval - reference.mean_retrieval), min(names, key=differences.get)
        axis.scatter(mean, row, s=260, marker="|", color="black", linewidths=2, zorder=3)
        axis.annotate(worst, (differences[worst], at[names.index(worst)]), (-5, 0), textcoords="offset points", **LEFT)
    axis.set_yticks(range(len(others)), [peer.peer for peer in others])
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(
        "difference to float32 in points: a dot for each language, the worst with its name, a bar for their mean"
    )
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(
        f"Retrieval of translations after rounding, {100 * reference.mean_retrieval:.1f} % in float32\n{title(run)}",
        fontsize=11,
    )
    figure.savefig(path)
