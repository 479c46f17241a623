"""CHANGELOG.md keeps the form of Keep a Changelog 1.1.0, and its versions are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def faults(text: str, version: str) -> list[str]:
    """What is not of the form. `version`: of the package, which is the newest released or the next one."""
    found = []
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    heads = [section.partition("\n")[0] for section in sections]
    if not heads or heads[0] != "[Unreleased]":
        found.append("the first section is not [Unreleased]")
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", head) for head in heads[1:]]
    found += [
        f"{head!r} is no version with its date" for head, m in zip(heads[1:], released, strict=True) if not m
    ]
    numbers = [tuple(map(int, match[1].split("."))) for match in released if match]
    if numbers != sorted(numbers, reverse=True):
        found.append("versions are not newest first")
    if numbers and numbers[0] > tuple(map(int, version.split("."))):
        found.append(f"{numbers[0]} is newer than the package's {version}")
    for head, section in zip(heads, sections, strict=True):
        before, *kinds = re.split(r"^### ", section, flags=re.MULTILINE)
        if before.partition("\n")[2].strip():
            found.append(f"{head}: text that is of no kind")
        for kind in kinds:
            name, _, body = kind.partition("\n")
            if name not in KINDS:
                found.append(f"{head}: {name!r} is none of {KINDS}")
            if not all(re.match(r"- |  \S|$", line) for line in body.splitlines()) or "- " not in body:
                found.append(f"{head}, {name}: not a list of changes")
        names = [kind.partition("\n")[0] for kind in kinds]
        if len(set(names)) != len(names):
            found.append(f"{head}: a kind stands twice")
    return found


def test_the_changelog_has_the_form() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project]")[2]
    version = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert version is not None
    assert not faults((ROOT / "CHANGELOG.md").read_text("utf-8"), version[1])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("# Changelog\n", "[Unreleased]"),
        ("## Unreleased\n", "[Unreleased]"),
        ("## [Unreleased]\n- x\n", "of no kind"),
        ("## [Unreleased]\n### New\n- x\n", "'New'"),
        ("## [Unreleased]\n### Added\nx\n", "list of changes"),
        ("## [Unreleased]\n### Added\n- x\n### Added\n- y\n", "twice"),
        ("## [Unreleased]\n## 0.1.0\n", "no version with its date"),
        ("## [Unreleased]\n## [0.1.0] - 2026-11-01\n## [0.1.1] - 2026-11-02\n", "newest first"),
        ("## [Unreleased]\n## [0.2.0] - 2026-11-01\n", "newer than"),
    ],
)
def test_another_form_is_found(text: str, word: str) -> None:
    assert any(word in fault for fault in faults(text, "0.1.1"))


def test_the_form_itself_passes() -> None:
    text = "## [Unreleased]\n\n### Fixed\n- x\n  more\n\n## [0.1.1] - 2026-11-02\n\n### Added\n- y\n"
    assert not faults(text, "0.1.1")
