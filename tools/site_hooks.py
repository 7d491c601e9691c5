"""mkdocs hooks that build the site from the documents in the repository.

Pages outside of docs/ (the READMEs, the benchmarks, the samples) become pages of the site, and links to and from them
are adapted. The links in the files themselves stay valid on any code host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What lies outside of docs/, and its page on the site.
OUTSIDE = {
    "README.md": "index.md",
    "README_zh.md": "index_zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "data/README.md": "samples.md",
    "LICENSE": "license.md",
    "notebooks/dpo.ipynb": "notebooks/dpo.ipynb",
    "notebooks/ppo.ipynb": "notebooks/ppo.ipynb",
}
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside of docs/, and the notebooks as downloads."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "LICENSE":
            text = f"# License\n\n```text\n{text}\n```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points the links of a page to the site's pages."""
    source = {page: source for source, page in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda link: link[1] + site_link(source, link[2]) + (link[3] or "") + link[4], markdown)


def site_link(source: str, link: str) -> str:
    """The site's address of a link in the repository file `source`; both are relative paths."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if found in OUTSIDE:
        return OUTSIDE[found]
    return found.removeprefix("docs/") if found.startswith("docs/") else link
