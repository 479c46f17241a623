"""Plotting a run: its loss, its accuracy per TTT step, and after an evaluation the acceptance of the trained
and the untrained draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAINED, UNTRAINED, HELDOUT = "#1f6f8b", "#b8b8b8", "#d1495b"
WARNING_WIDTH = 150
PALETTE = "viridis"


def draw_report(
    metrics_jsonl: str | Path,
    eval_json: str | Path | None,
    png: str | Path,
    warnings: Sequence[str] = (),
) -> Path:
    """Draw `png` from a run's metrics and, if there is one, its eval.json; `warnings` stand below.

    Raises:
        ValueError: the metrics file has no line.
    """
    lines = Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    if not records:
        raise ValueError(
            f"{str(metrics_jsonl)!r} holds no line, so there is no run to draw. Name the file of a run."
        )
    evaluation = json.loads(Path(eval_json).read_text(encoding="utf-8")) if eval_json is not None else None
    figure = Figure(figsize=(12, 8 if evaluation else 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if evaluation else 1, 2, squeeze=False)
    _draw_loss(axes[0, 0], records)
    _draw_accuracy(axes[0, 1], records)
    if evaluation:
        _draw_positions(axes[1, 0], evaluation)
        _draw_contexts(axes[1, 1], evaluation)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    if warnings:
        lines = [f"warning: {warning}" for warning in warnings]
        figure.supxlabel(
            "\n".join(fill(line, WARNING_WIDTH) for line in lines), fontsize="small", color=HELDOUT
        )
    figure.savefig(png)
    return Path(png)


def _draw_loss(axis: Axes, records: Sequence[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    axis.plot(
        steps,
        [record["loss"] for record in records],
        color=TRAINED,
        label="training",
        marker=_marker(records),
    )
    heldout = [record for record in records if "heldout" in record]
    if heldout:
        values = [record["heldout"]["loss"] for record in heldout]
        axis.plot([record["step"] for record in heldout], values, color=HELDOUT, marker="o", label="held out")
        axis.legend(frameon=False)
    axis.set(title="Loss, summed over the TTT steps", xlabel="optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_accuracy(axis: Axes, records: Sequence[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    count = len(records[0]["step_accuracy"])
    colors = _colors(count)
    for k in range(count):
        values = [record["step_accuracy"][k] for record in records]
        axis.plot(steps, values, color=colors[k], label=f"step {k}", marker=_marker(records))
    axis.set(title="Accuracy per TTT step, training", xlabel="optimizer step", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")


def _draw_positions(axis: Axes, evaluation: dict[str, Any]) -> None:
    for name, suffix, color in (("untrained", "_untrained", UNTRAINED), ("trained", "", TRAINED)):
        rows = evaluation[f"acceptance_by_position{suffix}"]
        positions = [row["position"] for row in rows]
        values = [row["accepted"] or 0.0 for row in rows]
        axis.bar([p + (-0.2 if suffix else 0.2) for p in positions], values, 0.4, color=color, label=name)
    axis.set(title="Share of rounds that accept a guess", xlabel="draft position", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)


def _draw_contexts(axis: Axes, evaluation: dict[str, Any]) -> None:
    rows = [row for row in evaluation["acceptance_by_context"] if row["rounds"]]
    labels = [f"up to {row['up_to']}" if row["up_to"] else f"above {row['above']}" for row in rows]
    other = {row["above"]: row["acceptance_length"] for row in evaluation["acceptance_by_context_untrained"]}
    places = range(len(rows))
    for shift, values, color in (
        (-0.2, [other[row["above"]] or 0.0 for row in rows], UNTRAINED),
        (0.2, [row["acceptance_length"] for row in rows], TRAINED),
    ):
        bars = axis.bar([place + shift for place in places], values, 0.4, color=color)
        axis.bar_label(bars, fmt="%.2f", fontsize="small")
    axis.set_xticks(list(places), labels)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    title = f"Tokens per target forward (mean {_number(evaluation['acceptance_length'])}, "
    axis.set(
        title=title + f"untrained {_number(evaluation['acceptance_length_untrained'])}"
        f"{_without_loops(evaluation)})",
        xlabel="tokens of context",
    )


def _without_loops(evaluation: dict[str, Any]) -> str:
    """The figure that counts where the target repeats itself; nothing where it does not."""
    looping = evaluation.get("looping_prompts")
    if not looping:
        return ""
    without = _number(evaluation["acceptance_length_without_loops"])
    return f"; {looping} of {evaluation['prompts']} answers loop,\nwithout them {without}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _marker(records: Sequence[dict[str, Any]]) -> str:
    """With a single record, the marker that makes its point visible: a line through one point is not."""
    return "o" if len(records) == 1 else ""


def _colors(count: int) -> list[Any]:
    return [colormaps[PALETTE](0.9 * k / max(1, count - 1)) for k in range(count)]
