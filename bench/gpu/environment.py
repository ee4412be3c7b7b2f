"""Makes a virtual environment from what this Python has installed, without a network, and installs this package there.

python -m bench.gpu.environment FOLDER
"""

import pathlib
import site
import subprocess
import sys
import sysconfig
import venv

from bench import ROOT

NEEDED = ("torch", "triton", "transformers", "sentencepiece", "numpy", "setuptools", "pip")


def main(folder: str) -> int:
    """Returns the exit code: 1, and on stderr what is missing, where the package could not run."""
    venv.create(folder, system_site_packages=True, with_pip=False, symlinks=True)
    python = pathlib.Path(folder, "bin", "python")
    # This Python may live in an environment of its own, which `system_site_packages` does not reach.
    inside = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    lines = [f"import site; site.addsitedir({path!r})" for path in installed_folders()]
    pathlib.Path(inside.strip(), "installed_outside.pth").write_text("\n".join(lines) + "\n")

    code = f"import importlib.util as i; print(*(n for n in {NEEDED} if i.find_spec(n) is None))"
    missing = subprocess.check_output([python, "-c", code], text=True).split()
    if missing:
        names = " ".join(missing)
        print(f"{sys.executable} lacks what this needs; `{sys.executable} -m pip install {names}`", file=sys.stderr)
        return 1
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-build-isolation", "--no-deps"]
    return subprocess.call([python, "-m", "pip", "install", *options, "--editable", str(ROOT)])


def installed_folders() -> list[str]:
    """Where this Python finds its packages."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(path for path in own if pathlib.Path(path).is_dir()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
