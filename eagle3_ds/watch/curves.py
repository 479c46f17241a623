"""Curves of few points, and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

BLOCKS = "▁▂▃▄▅▆▇█"
Points = Sequence[tuple[int, float]]
"""(step, value), by steps."""


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points: the means of as many runs of neighbours, equally long up to one."""
    if len(points) <= most:
        return [(float(step), value) for step, value in points]
    borders = [number * len(points) // most for number in range(most + 1)]
    parts = [points[start:end] for start, end in zip(borders, borders[1:], strict=False)]
    return [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]


def sparkline(points: Points, width: int) -> str:
    """One block for each point, at most `width`; from the lowest to the highest value. Empty for no point;
    a curve without a slope lies in the middle.
    """
    values = [value for _, value in thinned(points, width)]
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)
