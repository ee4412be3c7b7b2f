"""A page that shows texts with what was found in them: spans in colours, relations as nested lists."""

import heapq
import html
import os
from collections.abc import Iterable
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1d2129; --faint: #6b7280; --line: #e3e6ea;
  --light: 88%; --deep: 34% }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1e2127; --ink: #e6e8eb; --faint: #9aa2ad;
  --line: #30343c; --light: 27%; --deep: 74% } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.75 system-ui, "Noto Sans CJK SC", sans-serif }
header { position: sticky; top: 0; z-index: 1; padding: .8rem 1.5rem; background: var(--card);
  border-bottom: 1px solid var(--line) }
header h1 { display: inline-block; margin: 0 1rem 0 0; font-size: 1.1rem }
header input[type=search] { padding: .3rem .7rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--back); color: inherit; font: inherit; font-size: .9rem }
#names { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .6rem; max-height: 9rem; overflow: auto }
#names label { padding: 0 .7rem; border-radius: 1rem; font-size: .85rem; cursor: pointer;
  background: hsl(var(--hue) 75% var(--light)) }
#names label:has(input:not(:checked)) { opacity: .4 }
#names input { display: none }
main { max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
article { margin-bottom: 1rem; padding: 1rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem }
article > p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { padding: .1em .25em; border-radius: .3em; color: inherit; background: hsl(var(--hue) 75% var(--light));
  box-shadow: inset 0 -2px hsl(var(--hue) 60% var(--deep)) }
mark.off { padding: 0; background: none; box-shadow: none }
article > ul { margin: .8rem 0 0; padding: .7rem 0 0; border-top: 1px solid var(--line) }
ul { padding-left: 1.2rem; list-style: none }
article ul ul { border-left: 2px solid var(--line); margin-left: .3rem }
b { color: hsl(var(--hue) 60% var(--deep)); font-weight: 600 }
small { color: var(--faint); font-variant-numeric: tabular-nums }
"""

SCRIPT = """
const articles = [...document.querySelectorAll("article")];
document.querySelector("#names").addEventListener("change", ({ target }) => {
  for (const mark of document.querySelectorAll("mark"))
    if (mark.dataset.name === target.value) mark.classList.toggle("off", !target.checked);
});
document.querySelector("input[type=search]").addEventListener("input", ({ target }) => {
  const wanted = target.value.toLowerCase();
  for (const article of articles) article.hidden = !article.textContent.toLowerCase().includes(wanted);
});
"""


def write_page(path: str | os.PathLike, items: Iterable[dict]) -> None:
    """Writes a page that needs nothing but itself.

    Args:
        path: the page; it appears when it is complete.
        items: dictionaries with a `text`, and the `result` that `extract` has for it.
    """
    hues: dict[str, int] = {}
    counts: dict[str, int] = {}
    articles = [_article(item["text"], item["result"], hues, counts) for item in items]
    names = "".join(
        f'<label style="--hue: {hues[name]}"><input type="checkbox" value="{_quote(name)}" checked>{_quote(name)} '
        f"<small>{count}</small></label>"
        for name, count in counts.items()
    )
    page = (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>Extraction</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>"
        f"<body><header><h1>{len(articles)} texts</h1>"
        f'<input type="search" placeholder="Find" aria-label="Find"><div id="names">{names}</div></header>\n'
        f"<main>{''.join(articles)}</main><script>{SCRIPT}</script></body></html>\n"
    )
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def _article(text: str, result: dict, hues: dict[str, int], counts: dict[str, int]) -> str:
    spans: set[tuple[int, int, str]] = set()
    found = _list(result, hues, counts, spans)
    return f"<article><p>{_marked(text, spans, hues)}</p>{found}</article>\n"


def _list(result: dict, hues: dict[str, int], counts: dict[str, int], spans: set[tuple[int, int, str]]) -> str:
    """The spans by name with their relations; adds their places, names and colours to the others."""
    items = []
    for name, found in result.items():
        # Hues that are a golden angle apart differ however many there are.
        hue = hues.setdefault(name, int(210 + 137.5 * len(hues)) % 360)
        counts[name] = counts.get(name, 0) + len(found)
        for span in found:
            if "start" in span:
                spans.add((span["start"], span["end"], name))
            below = _list(span.get("relations", {}), hues, counts, spans)
            items.append(
                f'<li style="--hue: {hue}"><b>{_quote(name)}</b> {_quote(span["text"])} '
                f"<small>{span['probability']:.3f}</small>{below}</li>"
            )
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _marked(text: str, spans: Iterable[tuple[int, int, str]], hues: dict[str, int]) -> str:
    """The text with a mark around each span; one that crosses the end of another is cut there."""
    waiting = [(start, -end, name) for start, end, name in spans]
    heapq.heapify(waiting)
    parts, open_ends, place = [], [], 0

    def advance(to: int) -> None:
        nonlocal place
        while open_ends and open_ends[-1] <= to:
            end = open_ends.pop()
            parts.append(_quote(text[place:end]) + "</mark>")
            place = end
        parts.append(_quote(text[place:to]))
        place = to

    while waiting:
        start, end, name = heapq.heappop(waiting)
        advance(start)
        if open_ends and -end > open_ends[-1]:
            heapq.heappush(waiting, (open_ends[-1], end, name))
            end = -open_ends[-1]
        parts.append(f'<mark style="--hue: {hues[name]}" title="{_quote(name)}" data-name="{_quote(name)}">')
        open_ends.append(-end)
    advance(len(text))
    return "".join(parts)


def _quote(text: str) -> str:
    return html.escape(text)
