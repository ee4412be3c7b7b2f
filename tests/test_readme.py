"""README and CONTRIBUTING: examples run as pasted, the flag table is the one in the code, and what they name exists."""

import os
import re
import subprocess
import sys
from ast import literal_eval
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import pytest
import torch

from bench.__main__ import COMMANDS as BENCHMARKS
from erniem_fast import flags, ops
from erniem_fast.__main__ import main as erniem_fast_command
from erniem_fast.batch import TokenBatch
from erniem_fast.ops import Product
from erniem_fast.ops.choose import choose
from erniem_fast.verification.battery import battery
from tests import ROOT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README, CONTRIBUTING = DOCUMENTS.values()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def fenced(language, text):
    """The blocks of code in a language."""
    return [block for each, block in BLOCK.findall(text) if each == language]


(EXAMPLE,) = fenced("python", CONTRIBUTING)


def test_examples_run_one_after_another():
    blocks = fenced("python", README)
    assert len(blocks) >= 5
    environment = {name: value for name, value in os.environ.items() if not name.startswith(flags.PREFIX)}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    loss, difference = re.search(r"loss ([\d.]+)", ran.stdout), re.search(r"difference (\S+)", ran.stdout)
    assert float(loss.group(1)) < 0.3, ran.stdout
    assert float(difference.group(1)) < 1e-5, ran.stdout
    assert 0.99 < float(re.search(r"cosine ([\d.]+)", ran.stdout).group(1)) < 1, ran.stdout


def test_flag_table():
    table = README.split("<!-- flags: begin -->\n")[1].split("<!-- flags: end -->")[0]
    rows = ["| flag | values (the first is the default) | effect |", "|---|---|---|"]
    for flag in flags.FLAGS.values():
        values = ", ".join(f"`{value}`" for value in flag.values)
        rows.append(f"| `{flag.name}` | {values} | {flag.effect} |")
    assert table.splitlines() == rows


# --- CONTRIBUTING's example of an implementation ---------------------------------------------------------------------

# A few of the battery's shapes: they have every activation, dropout, and no bias.
SHAPES = (
    "18 tokens x 97, gelu, p 0.3",
    "18 tokens x 96, relu, p 0.1",
    "18 tokens x 1000, gelu_tanh, p 0.1",
    "1 token x 4096, gelu, p 0.1",
    "lengths around 16 x 768, gelu, p 0.0, no bias",
    "no tokens x 96, gelu, p 0.1",
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Adds an implementation to `bias_gelu`: a source as the new file, and the line of the table."""
    pytest.importorskip("triton")
    (line,) = re.findall(r"^\+ *(.*)$", fenced("diff", CONTRIBUTING)[0], flags=re.MULTILINE)

    def install(source):
        path = tmp_path / "bias_gelu_rows.py"
        path.write_text(source, encoding="utf-8")
        spec = spec_from_file_location("erniem_fast.kernels.bias_gelu_rows", path)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        # The line can use only what the op's file has imported already.
        for name, implementation in eval(f"{{{line}}}", vars(sys.modules[ops.bias_gelu.__module__])).items():
            monkeypatch.setitem(ops.IMPLEMENTATIONS["bias_gelu"], name, implementation)

    monkeypatch.setenv("ERNIEM_FAST_BIAS_GELU", "rows")
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
    return install


def call_bias_gelu():
    """Forward and backward by the implementation that the flag names."""
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, 5, 5, 18], device=DEVICE), 13, 18)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((18, 97), (97,))]
    dropout = batch.dropout(0.3, torch.tensor([7], device=DEVICE))
    ops.bias_gelu(Product(*leaves), "gelu", dropout).square().sum().backward()


def test_the_example_s_line_fits_into_the_op_s_file():
    diff = fenced("diff", CONTRIBUTING)[0].splitlines()
    context = "\n".join(line[1:] for line in diff if line.startswith(" "))
    assert (ROOT / "erniem_fast/ops/bias_gelu.py").read_text(encoding="utf-8").count(context) == 1
    assert len(diff) == len(context.splitlines()) + 1


def test_the_example_counts_as_the_reference(install):
    install(EXAMPLE)
    assert choose("bias_gelu", DEVICE, torch.float32) == "rows"
    call_bias_gelu()
    checks = [each for each in battery(DEVICE) if each.implementation == "rows" and each.shape in SHAPES]
    assert len(checks) == len(SHAPES) * 3  # float32, float16 and bfloat16
    for check in checks:
        for name, comparison in check.run().items():
            assert comparison.holds, (check, name, comparison)


@pytest.mark.parametrize(
    ("direction", "right", "wrong"),
    [
        ("forward", "x += tl.load", "x -= tl.load"),
        ("forward", "mask = features < FEATURES", "mask = features < FEATURES - 1"),
        ("forward", "threshold, rescale,", "threshold, 1.0,"),
        ("backward", "_derivative(x, ACTIVATION)", "_activate(x, ACTIVATION)"),
        ("backward", ").sum(0,", ").mean(0,"),
    ],
)
def test_the_example_with_a_mistake_is_refused(install, direction, right, wrong, poisoned_memory):
    assert EXAMPLE.count(right) == 1
    install(EXAMPLE.replace(right, wrong))
    with pytest.raises(RuntimeError, match=rf"bias_gelu {direction} \(rows\) disagrees with the reference"):
        call_bias_gelu()


# --- What the documents name -----------------------------------------------------------------------------------------

NEW_FILE = "kernels/bias_gelu_rows.py"  # of the example, for the reader to write
PLACEHOLDER = r"[A-Z]+"  # as in bench/results/MACHINE
FILES = [path for folder in ("erniem_fast", "kernels", "csrc", "bench", "tests") for path in (ROOT / folder).rglob("*")]
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
    links = [link for link in links if not link.startswith("http")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", DOCUMENTS[path or name] if anchor else "", flags=re.MULTILINE)
        assert not anchor or anchor in map(slug, headings), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    named = set(paths(DOCUMENTS[name])) - {NEW_FILE}
    assert len(named) >= 4
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
    assert len(made) >= 2
    assert made <= set(targets)
    modules = {each for line in code(DOCUMENTS[name]) for each in re.findall(r"python -m ([\w.]+) ?(\w*)", line)}
    assert len(modules) >= 2
    for module, command in modules:
        module = re.sub(rf"\.{PLACEHOLDER}$", "", module)
        assert find_spec(module), module
        if module == "erniem_fast":
            monkeypatch.setattr(sys, "argv", [module, command, "--help"])
            with pytest.raises(SystemExit, match="0"):
                erniem_fast_command()
        elif module == "bench" and not re.fullmatch(PLACEHOLDER, command):
            assert not command or command in BENCHMARKS, command


def test_an_installation_has_every_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^packages = (\[.*?\])$", project, flags=re.DOTALL | re.MULTILINE)
    files = [*(ROOT / "erniem_fast").glob("**/*.py"), *(ROOT / "erniem_fast/kernels").glob("*.py")]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in files}
    assert set(literal_eval(packages)) == folders
