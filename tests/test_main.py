"""The commands, as a user types them."""

from tests.commands import run


def test_build_makes_the_library_that_status_then_names(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert "embeddings   runs by torch" in run("status", **environment).stdout
    built = run("build", **environment)
    assert built.returncode == 0, built.stderr
    assert f"cpu: {tmp_path}" in built.stdout
    assert "embeddings   runs by native" in run("status", **environment).stdout


def test_build_says_what_failed(tmp_path):
    failed = run("build", CXX="false", XDG_CACHE_HOME=str(tmp_path))
    assert failed.returncode == 1
    assert "compiler" in failed.stderr
    assert "Traceback" not in failed.stderr
