"""A few bars with their names and figures, for the pictures of small results."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from bench.report.parts import COLOURS

OURS, OTHERS = COLOURS[0], "#BBBBBB"


def draw_bars(
    axis: Axes,
    names: Sequence[str],
    lengths: Sequence[float],
    texts: Sequence[str],
    colours: str | Sequence[str],
    quartiles: Sequence[tuple[float, float]] | None = None,
) -> None:
    """A few bars from top to bottom, each with its name before and a text behind it, and whiskers at its quartiles."""
    whiskers = quartiles and [
        [length - low for length, (low, _) in zip(lengths, quartiles, strict=True)],
        [high - length for length, (_, high) in zip(lengths, quartiles, strict=True)],
    ]
    at = range(len(names))
    bars = axis.barh(at, lengths, height=0.75, color=colours, xerr=whiskers, error_kw={"capsize": 2})
    axis.bar_label(bars, texts, padding=6, fontsize=9)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(*lengths, 1e-9))  # room for the texts
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
