"""Run by the Python of an environment that holds nothing but the wheel: it must be whole, and the package must work."""

import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import files

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


if __name__ == "__main__":
    main()
