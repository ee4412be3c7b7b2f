"""README, CONTRIBUTING and docs/: examples run as pasted, tables and messages are the code's, what they name exists.

CONTRIBUTING's worked example is tested in `test_worked_example.py`.
"""

import ast
import functools
import inspect
import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from transformers.models.auto import configuration_auto

import erniem_fast
from bench.__main__ import COMMANDS as BENCHMARKS
from erniem_fast import flags
from erniem_fast.__main__ import main as erniem_fast_command
from tests import ROOT
from tests.pasted import BLOCK, fenced
from tests.test_worked_example import FILES as NEW_FILES  # for the reader to write

MAIN = ("README.md", "CONTRIBUTING.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*MAIN, *PAGES)}
README, CONTRIBUTING = (DOCUMENTS[name] for name in MAIN)


def test_examples_run_one_after_another():
    documents = [name for name in ("README.md", *PAGES) if fenced("python", DOCUMENTS[name])]
    assert len(documents) >= 8
    environment = {name: value for name, value in os.environ.items() if not name.startswith(flags.PREFIX)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.pasted", *documents],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    printed = dict(zip(documents, re.split("^=== .*$", ran.stdout, flags=re.MULTILINE)[1:], strict=True))
    told = re.findall(r"^(\w\w) +\d+%  (.)", printed["README.md"], flags=re.MULTILINE)
    assert told == [("de", "B"), ("fr", "V"), ("ja", "名"), ("ru", "\u0412")], printed["README.md"]
    assert 0.99 < float(re.search(r"cosine ([\d.]+)", printed["README.md"]).group(1)) < 1
    for name in ("docs/flags.md", "docs/models.md", "docs/transformers.md"):
        (off,) = re.findall(r"(?:difference|off by) (\S+)$", printed[name], flags=re.MULTILINE)
        assert float(off) < 1e-5, printed[name]


def test_flag_table():
    table = DOCUMENTS["docs/flags.md"].split("<!-- flags: begin -->\n")[1].split("<!-- flags: end -->")[0]
    rows = ["| flag | values (the first is the default) | effect |", "|---|---|---|"]
    for flag in flags.FLAGS.values():
        values = ", ".join(f"`{value}`" for value in flag.values)
        rows.append(f"| `{flag.name}` | {values} | {flag.effect} |")
    assert table.splitlines() == rows


def test_the_messages_are_those_of_the_code():
    """Of the README's table of messages, by their words; an ellipsis stands for values."""
    table = README.split("## Troubleshooting\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| `")]
    assert len(cells) >= 8
    of_torch = "The differentiated Tensor at index 0"
    for cell in cells:
        message = re.match(r"`([^`]+)`", cell).group(1)
        words = [re.sub(r"\W+", " ", part).strip() for part in message.split("…")]
        pattern = ".*".join(re.escape(part) for part in words if part)
        assert message.startswith(of_torch) or any(re.search(pattern, each) for each in _messages()), message


@functools.cache
def _messages():
    """The words of all strings of the package, and of transformers' error of an unknown architecture."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "erniem_fast").rglob("*.py")]
    sources.append(inspect.getsource(configuration_auto))
    strings = []
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(source)) for source in sources):
        if isinstance(node, ast.JoinedStr):
            strings.append("".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    return [re.sub(r"(\W|%s)+", " ", each) for each in strings]


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: erniem_fast\.(?:\w+\.)?(\w+)$", DOCUMENTS["docs/api.md"], flags=re.MULTILINE)
    assert sorted(shown) == sorted(erniem_fast.__all__)


# --- What the documents name -----------------------------------------------------------------------------------------

PLACEHOLDER = r"[A-Z]+"  # as in bench/results/MACHINE
FOLDERS = ("erniem_fast", "kernels", "csrc", "bench", "docs", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
NAMES = {path.name for path in FILES}


def code(text):
    """What stands in backticks, and the lines of shell blocks without their comments."""
    shell = [line.split("#")[0].strip() for block in fenced("sh", text) for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    return [*shell, *(" ".join(each.split()) for each in inline)]


def exists(path):
    """Whether a path exists from the root or in `erniem_fast/`; of a name without folders, whether a file has it."""
    parts = [part for part in path.strip("/").split("/") if not re.fullmatch(PLACEHOLDER, part)]
    return any((root / "/".join(parts)).exists() for root in (ROOT, ROOT / "erniem_fast")) or path in NAMES


def paths(text):
    suffixes = "py|md|txt|toml|json|png|h|cpp|cu"
    for each in code(text):
        each = each.removeprefix("bash ")
        if re.fullmatch(rf"\.?\w[\w.-]*(/[\w.-]*)+|[\w-]+\.({suffixes})", each):
            yield each


def tree(text):
    """The paths of the maps. A line has names, then what they are; indented names lie in the folder above them."""
    for block in fenced("", text):
        folders = {}
        for line in block.splitlines():
            indent, names = re.fullmatch(r"( *)(\S+(?:, \S+)*)(?: {2,}\S.*)?", line).groups()
            parent = "".join(folder for depth, folder in sorted(folders.items()) if depth < len(indent))
            yield from (parent + name for name in names.split(", "))
            folders = {depth: folder for depth, folder in folders.items() if depth < len(indent)}
            folders[len(indent)] = names


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", DOCUMENTS[name]))
    for link in [link for link in links if not link.startswith("http")]:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_file(), link
        if anchor:
            text = DOCUMENTS[target.relative_to(ROOT).as_posix()]
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    named = {path for path in paths(DOCUMENTS[name]) if not path.startswith("build/")}  # which commands make
    named -= {*NEW_FILES}
    assert len(named) >= 4 or name != "CONTRIBUTING.md"
    assert [path for path in sorted(named) if not exists(path)] == []


def test_the_maps_show_the_repository_as_it_is():
    shown = {path.rstrip("/") for path in tree(CONTRIBUTING)}
    assert [path for path in sorted(shown) if not (ROOT / path).exists()] == []
    sources = {path.relative_to(ROOT).as_posix() for path in FILES if path.suffix in (".py", ".h", ".cpp", ".cu")}
    left_out = r"tests/.*|bench/peers/.*|.*/__init__.py|erniem_fast/(kernels|csrc)/.*"
    assert {path for path in sources if not re.fullmatch(left_out, path)} <= shown


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name, monkeypatch, capsys):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    made = {each for line in code(DOCUMENTS[name]) for each in re.findall(r"\bmake ([\w-]+)", line)}
    assert len(made) >= 2 or name not in MAIN
    assert made <= set(targets)
    modules = {each for line in code(DOCUMENTS[name]) for each in re.findall(r"python -m ([\w.]+) ?(\w*)", line)}
    assert len(modules) >= 2 or name not in MAIN
    for module, command in modules:
        module = re.sub(rf"\.{PLACEHOLDER}$", "", module)
        assert find_spec(module), module
        if module == "erniem_fast":
            monkeypatch.setattr(sys, "argv", [module, command, "--help"])
            with pytest.raises(SystemExit, match="0"):
                erniem_fast_command()
        elif module == "bench" and not re.fullmatch(PLACEHOLDER, command):
            assert not command or command in BENCHMARKS, command


def test_contributing_names_every_target_and_every_benchmark():
    """Each target that is no file is described at the page's beginning, and the list of benchmarks is whole."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    table = CONTRIBUTING.partition("\n## ")[0]
    assert {*phony.split()} == {*re.findall(r"`make ([\w-]+)", table)}
    (listed,) = re.findall(r"lists all benchmarks: (.*?)\.$", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(BENCHMARKS)


def test_an_installation_has_every_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^packages = (\[.*?\])$", project, flags=re.DOTALL | re.MULTILINE)
    files = [*(ROOT / "erniem_fast").glob("**/*.py"), *(ROOT / "erniem_fast/kernels").glob("*.py")]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in files}
    assert set(ast.literal_eval(packages)) == folders
