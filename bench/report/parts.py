"""What several reports share: a run's title, tables in Markdown, and colours."""

from collections.abc import Iterable

from bench.model.figures import Contender
from bench.record import Run

# Okabe and Ito's: safe for the colour-blind.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999"]
FORMS = ("packed", "bfloat16", "int8", "float8")  # of weights, as the names of peers end


def title(run: Run) -> str:
    """A run of the model, and the machine that it ran on."""
    return f"ERNIE-M {run.settings.model}, {run.settings.dtype}, on {machine(run)}"


def machine(run: Run) -> str:
    """The machine that a run of the model ran on, and how many of its threads."""
    ran_on = run.machine
    instructions = ", ".join([ran_on.instructions, *(ran_on.product_instructions or [])])
    threads = f"{run.settings.threads} thread{'s' * (run.settings.threads > 1)}"
    return ran_on.gpu or f"{ran_on.cpu}, {instructions}, {threads}"


def two_lines(run: Run) -> str:
    """The same for a picture that is too narrow for one line."""
    return title(run).replace(", on ", "\non ", 1)


def form(name: str) -> tuple[str, str | None]:
    """The name of a peer without the form of its weights, and that form."""
    rest, _, last = name.rpartition(" ")
    return (rest, last) if last in FORMS else (name, None)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """For each peer without its form a colour: one keeps it in every form, and the first one's is its own."""
    first, *others = dict.fromkeys(form(name)[0] for name in names)
    return {first: COLOURS[0], **{name: COLOURS[1 + i % (len(COLOURS) - 1)] for i, name in enumerate(others)}}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, in columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def contender(one: Contender) -> list[str]:
    """Its name, milliseconds with quartiles, how much faster it is, and the difference, as cells of a table."""
    return [
        one.name,
        f"{1e3 * one.seconds.median:.1f} ({1e3 * one.seconds.q1:.1f} to {1e3 * one.seconds.q3:.1f})",
        f"{one.speedup.median:.2f}x ({one.speedup.q1:.2f} to {one.speedup.q3:.2f})",
        f"{one.difference:.0e}",
    ]
