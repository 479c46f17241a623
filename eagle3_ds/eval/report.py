"""Plotting a run: its loss, its accuracy per TTT step, and after an evaluation the acceptance of the trained
and the untrained draft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from types import MappingProxyType
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eagle3_ds.colors import BLUE, GREY, ORANGE, VERMILION
from eagle3_ds.eval.evaluate import in_process
from eagle3_ds.eval.served_picture import LINES_ABOVE, curves, draw_lengths, draw_speeds

TRAINED, UNTRAINED, NGRAM, HELDOUT = BLUE, GREY, ORANGE, VERMILION
DRAFTS = (("untrained", "_untrained", UNTRAINED, ""), ("n-gram look-up", "_ngram", NGRAM, "//"))
"""What the trained draft is compared with: name, suffix of its keys in eval.json, colour, hatch."""
WARNING_WIDTH = 150
PALETTE = "viridis"
ABOVE, COLUMNS = 22, 8
"""Points between axes and title, where the legend stands; entries of a legend in one line."""
NOTE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}


def draw_report(
    metrics_jsonl: str | Path,
    evaluation: dict[str, Any] | None,
    png: str | Path,
    warnings: Sequence[str] = (),
    title: str = "",
    compared: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Path:
    """Draw `png` from a run's metrics and, if there is one, the content of its eval.json; `title` stands
    above and `warnings` below. `compared`: the content of eval.json of other runs, by name.

    Raises:
        ValueError: the metrics file has no line, or there is nothing to compare.
    """
    lines = Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    if not records:
        raise ValueError(
            f"{str(metrics_jsonl)!r} holds no line, so there is no run to draw. Name the file of a run."
        )
    figure = _figure(records, evaluation, title, compared)
    if warnings:
        told = "\n".join(fill(f"warning: {warning}", WARNING_WIDTH) for warning in warnings)
        figure.supxlabel(told, fontsize="small", color=HELDOUT)
    figure.savefig(png)
    return Path(png)


def _figure(
    records: Sequence[dict[str, Any]],
    result: dict[str, Any] | None,
    title: str = "",
    compared: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Figure:
    """The picture of a run's records, of its evaluation, and of acceptance on a server and of other runs."""
    evaluation, served = in_process(result), (result or {}).get("served")
    lines = curves(result or {}, compared) if served or compared else []
    rows = 1 + bool(evaluation) + bool(lines)
    figure = Figure(figsize=(13, 0.2 + 4.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False)
    _draw_loss(axes[0, 0], records)
    _draw_accuracy(axes[0, 1], records)
    if evaluation:
        _draw_positions(axes[1, 0], evaluation)
        _draw_contexts(axes[1, 1], evaluation)
    if lines:
        draw_lengths(axes[-1, 0], lines)
        draw_speeds(axes[-1, 1], lines)
        for axis in axes[-1]:
            if axis.get_legend_handles_labels()[0]:
                _legend_above(axis, LINES_ABOVE)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.suptitle("\n".join([*([title] if title else []), *_measured(evaluation)]), fontsize="medium")
    return figure


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
        places = [record["step"] for record in heldout]
        axis.plot(places, values, color=HELDOUT, marker="o", label="held out")
        _legend_above(axis, 2)
    axis.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    axis.set_title("Loss, summed over the TTT steps", pad=ABOVE)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_accuracy(axis: Axes, records: Sequence[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    count = len(records[0]["step_accuracy"])
    colors = _colors(count)
    for k in range(count):
        values = [record["step_accuracy"][k] for record in records]
        axis.plot(steps, values, color=colors[k], label=f"step {k}", marker=_marker(records))
    axis.set(xlabel="optimizer step", ylabel="share of tokens guessed right", ylim=(0, None))
    axis.set_title("Accuracy per TTT step, training", pad=ABOVE)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axis, min(count, COLUMNS))


def _draw_positions(axis: Axes, evaluation: dict[str, Any]) -> None:
    drafts = _drafts(evaluation, "acceptance_by_position")
    width = 0.8 / len(drafts)
    for number, (name, suffix, color, hatch) in enumerate(drafts):
        rows = evaluation[f"acceptance_by_position{suffix}"]
        places = [row["position"] + (number - (len(drafts) - 1) / 2) * width for row in rows]
        rounds = evaluation.get(f"target_forwards{suffix}")
        label = name if rounds is None else f"{name}, n = {rounds:,} rounds"
        values = [row["accepted"] or 0.0 for row in rows]
        axis.bar(places, values, width, color=color, hatch=hatch, edgecolor="white", label=label)
        # A bar of no height cannot be seen: its zero is written.
        for place, value in zip(places, values, strict=True):
            text, size = ("0", "small") if not value else (f"{100 * value:.0f}", "x-small")
            axis.annotate(text, (place, value), (0, 1), **NOTE, fontsize=size, color="black")
    axis.set(xlabel="guess", ylabel="share of rounds", ylim=(0, 1.05))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title("Rounds that accept a guess, in %", pad=ABOVE)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axis, len(drafts))


def _draw_contexts(axis: Axes, evaluation: dict[str, Any]) -> None:
    rows = [row for row in evaluation["acceptance_by_context"] if row["rounds"]]
    drafts = _drafts(evaluation, "acceptance_by_context")
    width = 0.8 / len(drafts)
    for number, (draft, suffix, color, hatch) in enumerate(drafts):
        name = f"{draft} {_mean(evaluation, suffix)}"
        found = {row["above"]: row for row in evaluation[f"acceptance_by_context{suffix}"]}
        for index, row in enumerate(rows):
            place = index + (number - (len(drafts) - 1) / 2) * width
            _draw_length(axis, place, width, found[row["above"]], color, hatch, name if not index else "")
    axis.set_xticks(range(len(rows)), [_bucket(row) for row in rows], fontsize="small")
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_title(f"Tokens per target forward{_without_loops(evaluation)}", pad=ABOVE)
    axis.set(
        xlabel="tokens of context, and n of the trained draft (dotted: no guess right)",
        ylabel="tokens per target forward",
    )
    axis.margins(y=0.15)
    axis.set_ylim(bottom=0)
    _legend_above(axis, len(drafts))


def _draw_length(
    axis: Axes, place: float, width: float, row: dict[str, Any], color: str, hatch: str, name: str
) -> None:
    """The bar of an acceptance length, its 95% interval and its value; a cross where there was no round."""
    value, interval = row["acceptance_length"], row.get("interval")
    bar = axis.bar(place, value or 0.0, width, color=color, hatch=hatch, edgecolor="white")
    if name:
        bar.set_label(name)
    if value is None:
        axis.annotate("no round", (place, 0), (0, 1), **NOTE, fontsize="x-small", rotation=90)
        return
    top = value
    if interval is not None:
        top = max(interval[1], value)
        axis.vlines(place, interval[0], interval[1], color="black", linewidth=1.2)
    axis.annotate(f"{value:.2f}", (place, top), (0, 1), **NOTE, fontsize="small")


def _drafts(evaluation: dict[str, Any], key: str) -> list[tuple[str, str, str, str]]:
    """The drafts of which an eval.json has figures, the trained one last."""
    found = [draft for draft in DRAFTS if f"{key}{draft[1]}" in evaluation]
    return [*found, ("trained", "", TRAINED, "")]


def _bucket(row: dict[str, Any]) -> str:
    """A bucket's name, and how much it rests on."""
    name = f"≤ {row['up_to']:,}" if row["up_to"] else f"> {row['above']:,}"
    prompts = f"{row['prompts']} prompts\n" if "prompts" in row else ""
    return f"{name}\n{prompts}{row['rounds']:,} rounds"


def _mean(evaluation: dict[str, Any], suffix: str) -> str:
    """An acceptance length with its 95% interval, where it has one."""
    interval = evaluation.get(f"acceptance_length{suffix}_interval")
    told = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return _number(evaluation[f"acceptance_length{suffix}"]) + told


def _measured(evaluation: dict[str, Any] | None) -> list[str]:
    """What an evaluation rests on, and its seconds."""
    if not evaluation:
        return []
    told = (
        f"evaluated on {evaluation['prompts']:,} held-out prompts, {evaluation['new_tokens']:,} new tokens, "
        "black lines and brackets are 95% intervals"
    )
    if "speedup" in evaluation:
        told += (
            f"; target alone {evaluation['seconds_target_alone']:.1f} s, with the draft "
            f"{evaluation['seconds_speculative']:.1f} s ({evaluation['speedup']:.2f} times as fast)"
        )
    return [told]


def _legend_above(axis: Axes, columns: int) -> None:
    """A legend between title and axes, where no curve runs."""
    axis.legend(
        frameon=False, fontsize="small", ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.1, columnspacing=1.0, handlelength=1.4,
    )  # fmt: skip


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
