"""Recipes of pre-training, as Markdown and as a picture."""

import pathlib
import statistics

from matplotlib.figure import Figure

from bench.model.figures import PretrainingFigures, PretrainingRun
from bench.report.parts import colours_of, machine, table


def markdown(run: PretrainingRun) -> str:
    """The report: each recipe's loss and accuracy, and the accuracy by language."""
    recipes = by_recipe(run)
    rows = [
        [
            name,
            str(len(runs)),
            _spread([each.curve[-1].loss for each in runs], "{:.3f}"),
            _spread([100 * each.curve[-1].accuracy for each in runs], "{:.1f} %"),
            f"{statistics.mean(each.seconds for each in runs):.0f} s",
        ]
        for name, runs in recipes.items()
    ]
    languages = sorted(run.runs[0].languages) if run.runs else []
    found = {name: _mean_by_language(runs) for name, runs in recipes.items()}
    means = [[language, *(f"{100 * each[language]:.1f}" for each in found.values())] for language in languages]
    return "\n".join(
        [
            "# Pre-training: objectives beside each other",
            "",
            f"{_what(run)}, on {machine(run)}, {run.date}.",
            f"Means over seeds, the least and the greatest. Guesses find {100 * run.chance:.1f} % of the translations;",
            f"models before their first step {100 * untrained(run):.1f} %, by the pieces that translations share.",
            "",
            table(["recipe", "seeds", "masked-LM loss", "translations found", "a run took"], rows),
            "",
            "Translations found by language, %, the mean of both directions and of all seeds:",
            "",
            table(["", *recipes], means),
            "",
        ]
    )


def _what(run: PretrainingRun) -> str:
    layers, _, hidden = run.settings.model.partition("-")[0].partition("x")
    return f"Models of {layers} layers and {hidden} features, from scratch, {run.tokens:,} tokens each"


def untrained(run: PretrainingRun) -> float:
    """The mean accuracy of models before their first step."""
    return statistics.mean(each.curve[0].accuracy for each in run.runs)


def by_recipe(run: PretrainingRun) -> dict[str, list[PretrainingFigures]]:
    """The runs of each recipe."""
    names = dict.fromkeys(each.recipe for each in run.runs)
    return {name: [each for each in run.runs if each.recipe == name] for name in names}


def _spread(values: list[float], form: str) -> str:
    numbers = [form.format(each) for each in (statistics.mean(values), min(values), max(values))]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def plot(run: PretrainingRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: accuracy and loss by tokens, a line for each run, and the accuracy by language."""
    figure = Figure(figsize=(15, 9), dpi=110, layout="constrained")
    figure.suptitle(_what(run), fontsize=14, fontweight="bold")
    upper, lower = figure.subfigures(2, 1)
    accuracy, loss = upper.subplots(1, 2)
    recipes = by_recipe(run)
    colours = colours_of(recipes)
    for name, runs in recipes.items():
        for index, each in enumerate(runs):
            tokens = [point.tokens for point in each.curve]
            style = {"color": colours[name], "label": None if index else name, "alpha": 0.8}
            accuracy.plot(tokens, [100 * point.accuracy for point in each.curve], **style)
            loss.plot(tokens, [point.loss for point in each.curve], **style)
    accuracy.axhline(100 * run.chance, color="gray", linestyle="--", linewidth=1, label="guesses")
    accuracy.set(xlabel="tokens, millions", ylabel="held-out translations found, %", ylim=(0, None))
    accuracy.set_title("Higher is better; each line is a seed", fontsize=11)
    loss.set(xlabel="tokens, millions", ylabel="masked-LM loss on held-out sentences")
    loss.set_title("Lower is better", fontsize=11)
    for axis in (accuracy, loss):
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
        axis.spines[["top", "right"]].set_visible(False)
    accuracy.legend(frameon=False)
    _plot_languages(lower.subplots(), recipes, colours)
    figure.savefig(path)


def _plot_languages(axis, recipes, colours):
    means = {name: _mean_by_language(runs) for name, runs in recipes.items()}
    last = list(means.values())[-1]
    languages = sorted(last, key=lambda language: -last[language])
    width = 0.8 / len(recipes)
    for index, (name, found) in enumerate(means.items()):
        places = [place + (index - (len(recipes) - 1) / 2) * width for place in range(len(languages))]
        axis.bar(places, [100 * found[language] for language in languages], width, color=colours[name])
    axis.set_xticks(range(len(languages)), languages)
    axis.set(ylabel="translations found, %", xlim=(-0.6, len(languages) - 0.4))
    axis.set_title("At the end, by language, the mean of all seeds", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)


def _mean_by_language(runs):
    return {language: statistics.mean(each.languages[language] for each in runs) for language in runs[0].languages}
