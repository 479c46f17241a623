"""report.png: loss, accuracy per TTT step, and acceptance of the trained draft against the untrained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises ValueError when there is none."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not records:
        raise ValueError(f"{path} holds no optimizer step, so there is nothing to report. Train first.")
    return records


def draw_report(folder: Path) -> Path:
    """Draw `folder`/report.png from metrics.jsonl and, when it exists, eval.json."""
    records = read_metrics(folder)
    evaluation_file = folder / "eval.json"
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.is_file() else None
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    loss, accuracy, acceptance = figure.subplots(1, 3)
    _draw_loss(loss, records)
    _draw_accuracy(accuracy, records)
    if evaluation is None:
        acceptance.set_axis_off()
        acceptance.text(0.5, 0.5, "not evaluated", ha="center", va="center")
    else:
        _draw_acceptance(acceptance, evaluation)
    path = folder / "report.png"
    figure.savefig(path, dpi=120)
    return path


def _draw_loss(axes: Axes, records: list[dict[str, Any]]) -> None:
    axes.plot([record["step"] for record in records], [record["loss"] for record in records], label="training")
    heldout = [record for record in records if "heldout" in record]
    if heldout:
        steps, values = [record["step"] for record in heldout], [record["heldout"]["loss"] for record in heldout]
        axes.plot(steps, values, "o-", label="held out")
    axes.set(title="loss", xlabel="optimizer step", ylabel="sum over k of decay^k x cross entropy")
    axes.legend()


def _draw_accuracy(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    for k in range(len(records[-1]["step_accuracy"])):
        axes.plot(steps, [record["step_accuracy"][k] for record in records], label=f"step {k}")
    axes.set(title="accuracy per TTT step (training)", xlabel="optimizer step", ylabel="share of supervised slots")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)


def _draw_acceptance(axes: Axes, evaluation: dict[str, Any]) -> None:
    for name, suffix in (("trained", ""), ("untrained", "_untrained")):
        rates = evaluation.get(f"acceptance_by_position{suffix}")
        if rates is not None:
            length = evaluation[f"acceptance_length{suffix}"]
            axes.plot(range(1, len(rates) + 1), rates, "o-", label=f"{name}: {length:.2f} tokens per round")
    axes.set(title="acceptance on held-out prompts", xlabel="draft position", ylabel="share accepted")
    axes.set_ylim(0, 1)
    axes.legend()
