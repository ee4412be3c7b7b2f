"""Building and loading csrc/: for real, in caches of the tests' own, and with everything that can be missing."""

import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erniem_fast.flags import use_kernels
from erniem_fast.native import compiler as compilers
from erniem_fast.native import library, wheel
from erniem_fast.native.build import build
from erniem_fast.native.library import BuildError
from erniem_fast.ops import embeddings
from erniem_fast.ops.choose import choose
from erniem_fast.reference import Norm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory) -> str:
    """The compiler without optimisation, in a quarter of the time; how fast the library is does not matter here."""
    script = tmp_path_factory.mktemp("bin") / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compilers.cpp())} "$@" -O0\n')
    script.chmod(stat.S_IRWXU)
    return str(script)


@pytest.fixture(scope="module")
def built(tmp_path_factory, quick_compiler) -> Path:
    """A cache that has the library, built by a process of its own."""
    folder = tmp_path_factory.mktemp("built")
    run_build(folder, quick_compiler).check_returncode()
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that makes a folder the cache; it begins with an empty one."""

    def use(folder: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        library.path.cache_clear()

    use(tmp_path / "home")
    yield use
    library.path.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that puts a shell script in the place of every C++ compiler; None for a machine without one."""

    def use(script: str | None) -> None:
        path = tmp_path / "bin"
        path.mkdir()
        for name in ("c++", "g++", "clang++") if script else ():
            (path / name).write_text(f"#!/bin/sh\n{script}\n")
            (path / name).chmod(stat.S_IRWXU)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr(compilers, "find_spec", lambda name: None)  # ziglang

    return use


def run_build(folder: Path, compiler: str, wait: bool = True):
    code = "from erniem_fast.native.build import build; print(build(['cpu'])['cpu'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(folder), "CXX": compiler},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run_embeddings() -> torch.Tensor:
    ids = torch.arange(4)
    norm = Norm(torch.ones(12), torch.zeros(12), 1e-5)
    return embeddings(ids, ids, torch.arange(48.0).view(4, 12).sin(), torch.zeros(4, 12), norm, padding_idx=1)


def chosen() -> str:
    return choose("embeddings", CPU, torch.float32)


def test_what_is_built_is_not_built_again(built, cache, compiler):
    cache(built)
    compiler(None)
    assert build(["cpu"]) == {"cpu": library.path("cpu")}
    assert library.status()["cpu"] == str(library.path("cpu"))
    assert chosen() == "native"


def test_auto_waits_for_a_build_and_never_starts_one(built, cache, compiler, tmp_path):
    compiler(f": > {tmp_path / 'started'}; exit 1")
    assert chosen() == "torch"
    expected = run_embeddings()
    assert not (tmp_path / "started").exists()
    assert "not built; run `python -m erniem_fast build`" in library.status()["cpu"]

    cache(built)
    assert chosen() == "native"
    torch.testing.assert_close(run_embeddings(), expected, rtol=1e-6, atol=1e-6)


def test_native_is_built_where_the_flag_asks_for_it(cache, quick_compiler, monkeypatch):
    monkeypatch.setenv("CXX", quick_compiler)
    monkeypatch.setenv("ERNIEM_FAST_EMBEDDINGS", "native")
    assert not library.path("cpu").exists()
    result = run_embeddings()
    assert library.path("cpu").exists()
    with use_kernels(embeddings="torch"):
        torch.testing.assert_close(result, run_embeddings(), rtol=1e-6, atol=1e-6)


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path, quick_compiler):
    processes = [run_build(tmp_path, quick_compiler, wait=False) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (file,) = (tmp_path / "erniem_fast").iterdir()
    assert {out.strip() for out, _ in outputs} == {str(file)}


def test_a_library_needs_nothing_of_torch(built):
    """So that an upgrade of torch does not need a new one."""
    (file,) = (built / "erniem_fast").iterdir()
    code = f"import ctypes; ctypes.CDLL({str(file)!r}).embeddings_forward"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


@pytest.mark.parametrize("device", library.DEVICES)
def test_the_name_follows_sources_and_flags(device, cache, tmp_path, monkeypatch):
    names = {library.path(device)}
    sources = shutil.copytree(compilers.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(compilers, "SOURCES", sources)
    library.path.cache_clear()
    assert {library.path(device)} == names

    with open(sources / "embeddings.h", "a") as header:
        header.write("// changed\n")
    library.path.cache_clear()
    names.add(library.path(device))
    monkeypatch.setattr(compilers, "flags", lambda device: ["-march=other"])
    library.path.cache_clear()
    names.add(library.path(device))
    assert len(names) == 3


def test_without_a_compiler_torch_serves_and_native_says_what_to_install(cache, compiler):
    compiler(None)
    assert chosen() == "torch"
    run_embeddings()
    names = r"\$CXX, c\+\+, g\+\+, clang\+\+, and the package ziglang"
    with use_kernels(embeddings="native"), pytest.raises(RuntimeError, match=f"No C.. compiler.*{names}.*pip install"):
        run_embeddings()


def test_a_compiler_that_cxx_names_and_that_is_not_there(cache, compiler, monkeypatch):
    compiler("exit 0")
    monkeypatch.setenv("CXX", "missing++ -v")
    with pytest.raises(BuildError, match=r"CXX='missing\+\+ -v' names a program that does not exist"):
        build(["cpu"])


def test_a_compiler_with_arguments(cache, compiler, monkeypatch, tmp_path):
    """As `ccache g++` is."""
    compiler(f'echo "$1" > {tmp_path / "first"}; for last; do :; done; : > "$last"')
    monkeypatch.setenv("CXX", "c++ -first")
    build(["cpu"])
    assert (tmp_path / "first").read_text() == "-first\n"


def test_a_failing_compiler_is_quoted(cache, tmp_path, monkeypatch):
    sources = shutil.copytree(compilers.SOURCES, tmp_path / "csrc")
    (sources / "embeddings.h").write_text("this is no C++\n")
    monkeypatch.setattr(compilers, "SOURCES", sources)
    library.path.cache_clear()
    with pytest.raises(BuildError, match=r"(?s)embeddings\.h:1.*this is no C\+\+.*GCC 9"):
        build(["cpu"])
    assert list(library.cache().iterdir()) == []


def test_a_home_that_cannot_be_written(cache, tmp_path):
    (tmp_path / "file").write_text("")
    cache(tmp_path / "file")
    assert chosen() == "torch"
    run_embeddings()
    with pytest.raises(BuildError, match=r"cannot be written to: .*Set XDG_CACHE_HOME"):
        build(["cpu"])


def test_a_library_that_does_not_load(cache):
    library.cache().mkdir(parents=True)
    library.cache().chmod(0o700)
    library.path("cpu").write_text("garbage")
    library.path("cpu").chmod(0o700)
    assert chosen() == "torch"
    assert re.search(r"does not load: .*Delete it", library.status()["cpu"])
    with use_kernels(embeddings="native"), pytest.raises(RuntimeError, match="does not load"):
        run_embeddings()


# ---- Libraries that a wheel brings


@pytest.fixture
def shipped(built, cache, compiler, tmp_path, monkeypatch) -> Path:
    """A library in the package, on a machine with neither a compiler nor a cache."""
    (file,) = (built / "erniem_fast").iterdir()
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.setattr(library, "SHIPPED", folder)
    compiler(None)
    return Path(shutil.copy(file, folder / file.name))


def test_a_library_of_the_wheel_serves_without_a_build(shipped):
    assert chosen() == "native"
    assert library.status()["cpu"] == str(shipped)
    assert build(["cpu"]) == {"cpu": shipped}
    assert not library.cache().exists()


def test_a_library_of_the_wheel_for_another_capability_is_not_loaded(shipped, monkeypatch):
    monkeypatch.setattr(compilers, "flags", lambda device: ["-march=other"])
    library.path.cache_clear()
    assert chosen() == "torch"


def test_the_wheels_libraries_have_the_names_that_are_looked_for(monkeypatch, cache):
    """On each machine, and with each capability, that there is a library for."""
    for machine, capabilities in wheel.CAPABILITIES.items():
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        looked_for = set()
        for capability in capabilities:
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            library.path.cache_clear()
            looked_for.add(library.path("cpu").name)
        assert {path.name for path in wheel.recipes(Path("libraries"), machine)} == looked_for


# ---- Caches that others may write to


@pytest.fixture
def copied(built, cache, tmp_path) -> Path:
    """A cache of the test's own that has the library; the folder that holds it."""
    folder = Path(shutil.copytree(built, tmp_path / "copied"))
    cache(folder)
    assert chosen() == "native"
    library._opened.clear()
    return folder / "erniem_fast"


def assert_refused(message: str) -> None:
    """Whatever asks for the library says why there is none; the op runs in PyTorch unless a flag names the library."""
    assert chosen() == "torch"
    run_embeddings()
    assert re.search(message, library.status()["cpu"])
    with pytest.raises(BuildError, match=message):
        build(["cpu"])
    with use_kernels(embeddings="native"), pytest.raises(RuntimeError, match=message):
        run_embeddings()


WRITABLE = r"{} can be written to by others \(mode {:o}\), .* run `chmod go-w {}`; else: Set XDG_CACHE_HOME"


@pytest.mark.parametrize("mode", [0o775, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(copied, mode):
    copied.chmod(mode)
    assert_refused(WRITABLE.format(copied, mode, copied))
    copied.chmod(mode & ~0o022)
    assert chosen() == "native"


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_library_that_others_may_write_to_is_refused(copied, mode):
    (file,) = copied.iterdir()
    file.chmod(mode)
    assert_refused(WRITABLE.format(file, mode, file))
    file.chmod(mode & ~0o022)
    assert chosen() == "native"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_is_another_users_is_refused(copied):
    (file,) = copied.iterdir()
    for path in (copied, file):
        os.chown(path, 4321, -1)
        assert_refused(f"{path} belongs to user 4321, not to you \\(user 0\\), .* run `chown 0 {path}`; else: Set XDG")
        os.chown(path, 0, -1)
    assert chosen() == "native"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_is_roots_serves_all(copied, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert chosen() == "native"


def test_links_are_followed(copied, cache, tmp_path):
    """To the folder and to the library: what counts is who may write to where they lead."""
    (file,) = copied.iterdir()
    for name, target in (("to_folder", copied), ("to_library", file)):
        home = tmp_path / name
        link = home / "erniem_fast" / file.name if target is file else home / "erniem_fast"
        link.parent.mkdir(mode=0o700, parents=True)
        link.symlink_to(target)
        cache(home)
        assert chosen() == "native"
        library._opened.clear()
        copied.chmod(0o777)
        assert_refused(WRITABLE.format(copied, 0o777, copied))
        copied.chmod(0o755)


def test_a_folder_above_that_others_may_write_to_is_no_danger(copied):
    """As /tmp is: what they put in place of the user's folder would not be the user's."""
    copied.parent.chmod(0o777)
    assert chosen() == "native"


def test_others_may_not_write_to_what_is_built(cache, compiler):
    """Whatever the umask leaves to them."""
    compiler('for last; do :; done; : > "$last"')  # makes an empty library, behind `-o`
    umask = os.umask(0)
    try:
        file = build(["cpu"])["cpu"]
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not file.stat().st_mode & 0o022


def test_a_user_without_a_home(cache, monkeypatch):
    """As in containers that run under any number of user."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    library.path.cache_clear()
    assert_refused("no folder for the cache: .*Set XDG_CACHE_HOME")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device():
    assert library.status()["cuda"] == "torch finds no CUDA device."
    with pytest.raises(BuildError, match="no CUDA device"):
        build(["cuda"])


def test_dtypes_that_native_does_not_serve(built, cache):
    cache(built)
    assert choose("embeddings", CPU, torch.float64) == "torch"
    with use_kernels(embeddings="native"), pytest.raises(RuntimeError, match=r"not torch\.float64; cast the model"):
        choose("embeddings", CPU, torch.float64)


# By kernel and the elements of a row that is kept in registers, 0 for none. Of 65,536 registers of a multiprocessor:
# with 64 a thread, 32 warps are resident; with 72, 28; with 128, 16; with 168, 12, and with 255 still 8.
REGISTERS = {
    ("forward_kernel", 0): 64,
    ("forward_kernel", 768): 64,
    ("forward_kernel", 1024): 72,
    ("backward_kernel", 0): 128,
    ("backward_kernel", 768): 168,
    ("backward_kernel", 1024): 255,
    ("scatter_kernel", 0): 168,
    ("join_kernel", 0): 168,
    ("clear_kernel", 0): 64,
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_compiles_and_links_without_spills(tmp_path):
    architectures = (80, 90, 100, 120)
    output = tmp_path / "embeddings_cuda.so"
    command = [shutil.which("nvcc"), *compilers.cuda_flags(architectures), "-Xptxas=-v"]
    source = compilers.SOURCES / "embeddings_cuda.cu"
    run = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert output.exists()

    report = re.findall(
        r"Compiling entry function '\S*?([a-z]+_kernel)\S+?Li(\d+)EEEEEv\S+' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        run.stdout + run.stderr,
        flags=re.DOTALL,
    )
    found = {(kernel, int(hidden), int(architecture)) for kernel, hidden, architecture, *_ in report}
    assert found == {(*key, architecture) for key in REGISTERS for architecture in architectures}
    in_memory = sum(elements == 0 for _, elements in REGISTERS)  # of rows that are aligned, and of others
    assert len(report) == len(architectures) * 3 * (len(REGISTERS) + in_memory)  # three dtypes
    for kernel, hidden, architecture, *bytes_of_memory, registers in report:
        name = f"{kernel} of {hidden} on sm_{architecture}"
        assert [*map(int, bytes_of_memory)] == [0, 0, 0], f"{name} keeps registers in memory"
        assert int(registers) <= REGISTERS[kernel, int(hidden)], f"{name} takes {registers} registers"
