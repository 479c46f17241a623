"""locks/ has one file for each Python that the package says it runs on, each within the package's bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
LOCKS = sorted((ROOT / "locks").glob("python*.txt"))


def bounds() -> list[Requirement]:
    """The package's requirements, without those of its extras."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [Requirement(text) for text in re.findall(r'"(.+?)"', block[1])]


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)", path.read_text("utf-8"), re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in found}


def test_each_python_has_a_lock() -> None:
    assert PYTHONS and [f"python{version}.txt" for version in PYTHONS] == [path.name for path in LOCKS]
    wanted = re.search(r'^requires-python = "(.+)"', PROJECT, re.MULTILINE)
    assert wanted is not None and all(version in SpecifierSet(wanted[1]) for version in PYTHONS)
    assert f">={PYTHONS[0]}" == wanted[1]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_keeps_to_the_bounds(path: Path) -> None:
    locked = pins(path)
    for wanted in bounds():
        version = locked[str(canonicalize_name(wanted.name))]
        assert version in wanted.specifier, f"{wanted} is locked to {version}"
    tested = pins(ROOT / "constraints.txt")
    assert {name: locked[name] for name in ("torch", "deepspeed")} == {
        name: tested[name] for name in ("torch", "deepspeed")
    }
    # The command in the file's head makes it anew.
    assert f"--python-version {path.stem.removeprefix('python')} " in path.read_text("utf-8")
