"""The documentation site, built as users build it: its pages, links, anchors and pictures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


class Page(HTMLParser):
    """What a built page links to, its anchors, and the text of its paragraphs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [str(values[key]) for key in ("href", "src") if values.get(key)]
        if identifier := values.get("id"):
            self.anchors.add(identifier)
        self._open.append(tag)
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "p" in self._open and "code" not in self._open:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def names_of(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from names_of(list(nav.values()))
    elif isinstance(nav, list):
        for entry in nav:
            yield from names_of(entry)


def test_every_page_is_in_the_site_and_in_its_contents(pages: dict[Path, Page], site: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = list(names_of(nav_of(text)))
    of_root = {"index.md", "changelog.md", "contributing.md"}
    assert set(nav) == of_root | {path.name for path in (ROOT / "docs").glob("*.md")}
    built = {path.relative_to(site).as_posix() for path in pages}
    assert {"index.html" if n == "index.md" else f"{n[:-3]}/index.html" for n in nav} <= built


def nav_of(text: str) -> object:
    """The contents alone: the file also names a function, which a plain reader of YAML refuses."""
    part = text[text.index("\nnav:") :].split("\nplugins:")[0]
    return yaml.safe_load(part)["nav"]


def test_no_link_no_anchor_and_no_picture_is_broken(pages: dict[Path, Page], site: Path) -> None:
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            where = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            where = where / "index.html" if where.is_dir() else where
            checked += 1
            anchor = unquote(parts.fragment)
            there = pages.get(where)
            if not where.is_file() or (anchor and there is not None and anchor not in there.anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert checked > 500
    assert not broken


def test_lists_and_tables_are_read_as_on_github(pages: dict[Path, Page], site: Path) -> None:
    raw = [
        f"{path.relative_to(site)}: {paragraph[:80]}"
        for path, page in pages.items()
        for paragraph in page.paragraphs
        if any(line.startswith(("- ", "|", "1. ", "```")) for line in paragraph.split("\n"))
    ]
    assert not raw


def test_the_reference_has_signatures_and_docstrings(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "api" / "index.html").read_text("utf-8")
    for name in ("load_recipe", "RolloutTrainer", "prepare_usp_input", "ring_attention_hybrid_masked"):
        assert f'{name}"' in text
    assert text.count("Parameters:") + text.count("Raises:") > 10
