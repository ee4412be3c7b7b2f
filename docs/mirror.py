"""A hook of MkDocs: pages and what they link to stand on the site where they stand in the repository.

So a relative link leads to the same place on GitHub and on the site, and README.md is the site's first page.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace what MkDocs found in docs/ by the pages and the files that they link to; the theme's files stay."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    docs = ROOT / "docs"
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(docs.glob("*.md"))]
    linked = {*docs.glob("*.css"), *docs.glob("*.js")} | {
        (page.parent / link).resolve()
        for page in pages
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not link.startswith("http")
    }
    for path in [*pages, *sorted(linked - set(pages))]:
        if path.is_file():  # MkDocs itself complains about links that lead nowhere
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
