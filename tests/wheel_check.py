"""Run by the Python of an environment that holds nothing but the wheel: it must be whole, and the package must work."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import files

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("erniem_fast/kernels/", "erniem_fast/csrc/", "erniem_fast/ops/")

CHECK = """
import torch, erniem_fast
from erniem_fast.native import library
from erniem_fast.ops.choose import choose
config = erniem_fast.ErnieMConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
model = erniem_fast.ErnieMModel(config).eval()
output = model(torch.tensor([[5, 6, 7], [8, 9, 1]]))
assert output.last_hidden_state.shape == (2, 3, 32), output.last_hidden_state.shape
assert output.last_hidden_state[1, 2].abs().max() == 0, "padding is not zero"
for op in ("embeddings", "attention", "bias_gelu", "add_norm"):
    assert choose(op, torch.device("cpu"), torch.float32) == "native", library.status()
print("works from", erniem_fast.__file__, "with", library.path("cpu").name)
"""

# What the README's blocks run behind: the claim is nothing unless writing and connecting fail.
LOCKED = """
import os, socket
for attempt in (
    lambda: open(os.path.expanduser("~/written"), "w"),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=9),
):
    try:
        attempt()
    except OSError as error:
        print("as it should be:", error)
    else:
        raise SystemExit("the home can be written to, or a network is there")
"""


def main() -> None:
    installed = [str(file) for file in files("erniem-fast")]
    top_level = {name.split("/")[0] for name in installed if ".dist-info" not in name and not name.startswith("..")}
    assert top_level == {"erniem_fast"}, f"the wheel installs {sorted(top_level)}"
    for folder in SOURCES:
        assert any(name.startswith(folder) for name in installed), f"the wheel lacks {folder}"
    assert pathlib.Path(sys.prefix).name == "wheel-check", sys.prefix
    with tempfile.TemporaryDirectory() as elsewhere:
        # Without a compiler, and without a home to build in.
        bare = {"PATH": elsewhere, "HOME": f"{elsewhere}/missing"}
        subprocess.run([sys.executable, "-c", CHECK], check=True, cwd=elsewhere, env=bare)
    check_quick_start()


def check_quick_start() -> None:
    """The README's `build` and quick start, as pasted: without a compiler, a network, or a home to write to."""
    quick_start = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Quick start\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", quick_start, flags=re.DOTALL | re.MULTILINE)
    assert blocks, "README.md has no quick start"
    with tempfile.TemporaryDirectory() as folder:
        # The blocks run from the root of the repository, but there its own package would be imported, not the wheel's.
        golden = pathlib.Path(folder, "tests/golden")
        shutil.copytree(ROOT / "tests/golden/tiny", golden / "tiny")
        shutil.copytree(ROOT / "bench/data", pathlib.Path(folder, "bench/data"))
        pathlib.Path(folder, "home").mkdir()
        prefix = lock(f"{folder}/home")
        locked = [LOCKED] if prefix else []
        for command in (["-m", "erniem_fast", "build"], ["-c", "\n".join([*locked, *blocks])]):
            environment = {"PATH": f"{folder}/nothing", "HOME": f"{folder}/home"}
            subprocess.run([*prefix, sys.executable, *command], check=True, cwd=folder, env=environment)
    print("the README's quick start runs without a compiler" + ", a network, or a home to write to" * bool(prefix))


def lock(home: str) -> list[str]:
    """The arguments to put before a command that must find no network, and cannot write to `home`, even as root.

    The command gets network and mount namespaces of its own. The list is empty where the system does not allow these.
    """
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("unshare", "mount")}
    namespaces = [programs["unshare"] or "unshare", "--map-root-user", "--mount", "--net"]
    if not all(programs.values()) or subprocess.run([*namespaces, shutil.which("true")], check=False).returncode:
        print("NOT CHECKED: no network, and a home that cannot be written to. This needs util-linux, and namespaces.")
        return []
    mount = programs["mount"]
    script = f'{mount} --bind "$0" "$0" && {mount} -o remount,bind,ro "$0" && exec "$@"'
    return [*namespaces, "/bin/sh", "-c", script, home]


if __name__ == "__main__":
    main()
