"""What rounding costs, in Markdown and as a picture."""

import pathlib

from matplotlib.figure import Figure

from bench.model.figures import PeerQuality, QualityRun
from bench.report.parts import colours_of, form, table, title

SPREAD = 0.7  # of the distance between two languages
MARKERS = {"bfloat16": "o", "int8": "D"}


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
    reference = run.peers[0]
    rows = [[_name(run, peer), *_cells(peer, reference)] for peer in run.peers]
    return table(["", "mean cosine", "least cosine", "retrieval", "difference", "worst language"], rows)


def _name(run, peer):
    return f"{peer.peer}, {run.settings.dtype}" if peer is run.peers[0] else peer.peer


def _cells(peer: PeerQuality, reference: PeerQuality) -> list[str]:
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
    """Write the PNG `path`: for every language, how much better or worse than float32 each peer retrieves."""
    reference, *others = run.peers
    figure = Figure(figsize=(13, 5), dpi=130, layout="constrained")
    axis = figure.subplots()
    languages = sorted(reference.retrieval, key=lambda language: -reference.retrieval[language].mean)
    colours = colours_of(peer.peer for peer in run.peers)
    for i, peer in enumerate(others):
        differences = peer.differences(reference)
        name, weights = form(peer.peer)
        style = {"color": colours[name], "marker": MARKERS.get(weights, "s"), "label": peer.peer, "markersize": 4}
        beside = (i + 0.5) / len(others) - 0.5  # points that are as high stand side by side
        at = [place + SPREAD * beside for place in range(len(languages))]
        axis.plot(at, [differences[language] for language in languages], linestyle="none", **style)
    axis.set_xticks(range(len(languages)), languages)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        ylabel="points",
        title="Retrieval of translations, difference to float32; from the language that it retrieves best",
    )
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(run), fontweight="bold")
    if others:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
