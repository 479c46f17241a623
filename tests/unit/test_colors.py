"""Every picture takes its colours from one palette, which people with colour blindness tell apart."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eagle3_ds.colors import BLUE, COLORS, GREEN, GREY, MARKERS, ORANGE, SKY, VERMILION

ROOT = Path(__file__).parents[2]
FloatArray = NDArray[np.float64]
# Linear RGB as it is seen, of full severity: Machado, Oliveira and Fernandes 2009, table 1.
SEEN = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# Colours of one picture: lines; bars of a report; the sides of benchmarks.step.
TOGETHER = {
    "lines": COLORS,
    "bars": (BLUE, GREY, ORANGE, VERMILION),
    "steps": (BLUE, SKY, GREEN, VERMILION),
}
APART = 10.0
"""Of CIE Lab, in which 2.3 is a difference that is just seen."""


def lab(color: str, seen: FloatArray) -> FloatArray:
    """CIE Lab under D65 of a colour as it is seen."""
    given = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(seen @ linear, 0, 1) / TO_XYZ.sum(1)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def nearest(colors: tuple[str, ...], seen: FloatArray) -> float:
    places = [lab(color, seen) for color in colors]
    return float(min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2)))


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("picture", TOGETHER)
def test_colours_of_a_picture_are_told_apart(picture: str, eyes: str) -> None:
    assert nearest(TOGETHER[picture], SEEN[eyes]) > APART


def test_matplotlibs_own_colours_are_not() -> None:
    assert lab("#ffffff", SEEN["normal"]) == pytest.approx([100, 0, 0], abs=0.1)
    # matplotlib's second and third line, and its third and fourth.
    assert nearest(("#ff7f0e", "#2ca02c"), SEEN["protanopia"]) < APART
    assert nearest(("#2ca02c", "#d62728"), SEEN["deuteranopia"]) < APART


def test_a_line_has_a_marker_of_its_own() -> None:
    assert len(set(MARKERS)) == len(MARKERS) == len(COLORS)


def test_nobody_draws_with_other_colours() -> None:
    drawing = [
        path
        for folder in ("eagle3_ds", "benchmarks", "judge", "examples")
        for path in (ROOT / folder).glob("**/*.py")
        if "matplotlib" in path.read_text(encoding="utf-8")
    ]
    assert len(drawing) > 5
    for path in drawing:
        assert not re.findall(r'"(#[0-9a-fA-F]{6}|tab:\w+|C\d)"', path.read_text(encoding="utf-8")), path
