"""What mkdocs is told beyond mkdocs.yml: pages from the repository's root, links out of docs/.

CONTRIBUTING.md and CHANGELOG.md are pages of the site. A link to any other file of the repository
is checked, and becomes its text, since the site does not hold the sources.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FROM_ROOT = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|mod|meth|attr):<code>~?(?:[\w.]*\.)?(\w+)")


def on_files(files: Files, config: Any) -> Files:
    for name, path in FROM_ROOT.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = DOCS / page.file.src_uri
    source = FROM_ROOT.get(page.file.src_uri, place)
    return _LINK.sub(lambda link: _inside_site(link, source, place.parent), markdown)


def _inside_site(link: re.Match[str], source: Path, folder: Path) -> str:
    """The link from a page of the site in ``folder`` that was written in ``source``."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if re.match(r"\w+:", target):
        return link[0]
    path = (source.parent / target).resolve()
    if not path.exists():
        raise PluginError(f"{source.name}: expected a file for the link {target!r}, got none")
    for name, root in FROM_ROOT.items():
        if path == root:
            return f"[{text}]({os.path.relpath(DOCS / name, folder)}{anchor})"
    if path.is_relative_to(DOCS):
        return f"[{text}]({os.path.relpath(path, folder)}{anchor})"
    return text


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings may name things by reST's roles; the name is what is shown."""
    return _ROLE.sub(r"<code>\1", html)
