"""The picture of benchmarks.long_context: acceptance against context, a line for each draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eagle3_ds.colors import COLORS, MARKERS

SPREAD = 0.06
"""How far the lines stand apart, so that their intervals do not lie on each other; lengths are 1 apart."""


def draw(body: Mapping[str, Any], path: Path) -> None:
    """Draw the result of benchmarks.long_context."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    lines = body["by_context"]
    for place, (name, rows) in enumerate(lines.items()):
        shift = (place - (len(lines) - 1) / 2) * SPREAD
        places = [index + shift for index in range(len(rows))]
        label = (
            f"{name}: {body['drafts'][name]['what']}"
            if name in body["drafts"]
            else "n-gram look-up, no draft"
        )
        axis.plot(
            places,
            [row["acceptance_length"] for row in rows],
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            label=label,
            linestyle="-" if name in body["drafts"] else ":",
        )
        for x, row in zip(places, rows, strict=True):
            if row["interval"] is not None:
                axis.vlines(x, *row["interval"], color=COLORS[place % len(COLORS)], linewidth=1.2)
    lengths = [row["context"] for row in next(iter(lines.values()))]
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("tokens per forward of the target")
    axis.set_ylim(bottom=1.0)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
