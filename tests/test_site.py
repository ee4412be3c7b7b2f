"""The site that `make docs` builds: no warning, no error in a browser, no other host, and a search without a server."""

import re
import shutil
import subprocess
import sys

import pytest

import erniem_fast
from tests import ROOT

PAGES = ["index.html", "CONTRIBUTING.html", *(f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there_and_nothing_comes_from_another_host(site):
    for name in PAGES:
        page = (site / name).read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)|<link[^>]* href=\"([^\"]+)", page)
        assert [each for pair in loaded for each in pair if "//" in each] == []
    assert not (site / "docs/mirror.py").exists()


def test_the_api_shows_docstrings(site):
    page = (site / "docs/api.html").read_text(encoding="utf-8")
    for name in erniem_fast.__all__:
        assert re.search(rf'id="erniem_fast\.(\w+\.)?{name}"', page), name
    assert "The encoder of ERNIE-M" in page


@pytest.fixture
def browse(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile"]

    def browse(url):
        """The page's elements after its scripts ran, which must not write to the console."""
        command = [chromium, *options, "--virtual-time-budget=10000", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        return done.stdout

    return browse


def test_pages_open_from_a_disk(site, browse):
    start = browse((site / "index.html").as_uri())
    assert '<html lang="en" class="js' in start  # the theme's script ran
    linked = set(re.findall(r'<a href="([^"#]+)" class="md-nav__link', start))
    assert set(PAGES) - {"index.html"} <= linked
    back = set(re.findall(r'<a href="([^"#]+)" class="md-nav__link', browse((site / "docs/api.html").as_uri())))
    assert {"../index.html", "flags.html"} <= back


def test_the_search_finds_pages(site, browse):
    found = browse((site / "index.html").as_uri() + "?q=retrieval")
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link', found)
    assert any("docs/precision.html" in each or "index.html" in each for each in results), results
