"""The README's examples run as pasted, and its flag table is the one in the code."""

import os
import re
import subprocess
import sys

from erniem_fast import flags
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
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
