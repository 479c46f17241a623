"""The two images are one: the same base, the same packages of the system, the same installation."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = (ROOT / "containers" / "Dockerfile").read_text("utf-8")
APPTAINER = (ROOT / "containers" / "apptainer.def").read_text("utf-8")


def found(pattern: str) -> list[str]:
    return [
        match[1].strip() for text in (DOCKER, APPTAINER) if (match := re.search(pattern, text, re.MULTILINE))
    ]


def test_both_images_are_of_the_same_parts() -> None:
    for pattern in (r"^F(?:ROM|rom:) (.+)$", r"apt-get install (.+?)\s*\\?$", r"pip install (.+)$"):
        parts = found(pattern)
        assert len(parts) == 2 and parts[0] == parts[1]


def test_what_is_pinned_is_what_the_tests_run_with() -> None:
    assert all("-c constraints.txt" in line for line in found(r"pip install (.+)$"))
    assert {"torch", "deepspeed"} <= set(
        re.findall(r"^(\w+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
