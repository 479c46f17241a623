"""What `mkdocs build` does beside copying docs/: the pages of the repository's root become pages of the site,
files that a page links to outside docs/ become files of it, and Markdown is read as GitHub reads it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the root, and what they are called in the site."""
FILES = "files"
"""The folder of the site for what lies outside docs/."""
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^\s*```")
_BLOCK = re.compile(r"^(?:[-*] |\d+\. |\|)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and what any page links to outside docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    sources = [*(ROOT / name for name in PAGES), *DOCS.glob("*.md")]
    for path in sorted({path for page in sources for path in _outside(page)}):
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where things lie in the site, and set lists and tables apart from text above them."""
    name = page.file.src_uri
    source = next((ROOT / of_root for of_root, here in PAGES.items() if here == name), DOCS / name)

    def moved(match: re.Match[str]) -> str:
        link, _, anchor = match[2].partition("#")
        if not link or re.match(r"[a-z]+:", link):
            return match[0]
        place = _place((source.parent / link).resolve())
        return match[1] + place + ("#" + anchor if anchor else "") + match[3]

    return _apart(_LINK.sub(moved, markdown))


def _outside(page: Path) -> list[Path]:
    """The files outside docs/ that a page links to, pages of the root left out."""
    links = (match[2].partition("#")[0] for match in _LINK.finditer(page.read_text("utf-8")))
    paths = [(page.parent / link).resolve() for link in links if link and not re.match(r"[a-z]+:", link)]
    return [p for p in paths if p.is_file() and DOCS not in p.parents and _place(p) not in PAGES.values()]


def _place(path: Path) -> str:
    """Where a file of the repository lies in the site, seen from its root, in which all pages lie."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    name = os.path.relpath(path, ROOT)
    return PAGES.get(name, f"{FILES}/{name}")


def _apart(markdown: str) -> str:
    """GitHub lets a list or a table follow a line of text; Python's Markdown wants an empty line between."""
    lines: list[str] = []
    in_code = False
    for line in markdown.split("\n"):
        before = lines[-1] if lines else ""
        starts = _BLOCK.match(line) and before.strip() and not before.startswith(("  ", "\t"))
        if not in_code and starts and not _BLOCK.match(before):
            lines.append("")
        in_code ^= bool(_FENCE.match(line))
        lines.append(line)
    return "\n".join(lines)
