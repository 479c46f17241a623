"""Plotting acceptance and speed against context: of a server, and of other runs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from eagle3_ds.colors import COLORS, MARKERS

LINES_ABOVE = 3
"""Curves that a line of the legend names."""
SPREAD = 0.08
"""How far lines stand apart, so that their intervals do not lie on each other; buckets are 1 apart."""


@dataclass(frozen=True)
class Curve:
    """One run's acceptance by context. `is_served`: by a server's counters, over the lengths of prompts."""

    name: str
    is_served: bool
    rows: Sequence[Mapping[str, Any]]


def curves(own: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any]]) -> list[Curve]:
    """This run's line, if it has one, and those of other runs: by a server where it was measured, else by the
    evaluation in process, which the name then says.

    Raises:
        ValueError: another run has neither.
    """
    found = []
    for name, result in {"this run": own, **compared}.items():
        served = result.get("served")
        rows = (served or result).get("acceptance_by_context")
        if rows is not None:
            found.append(Curve(f"{name}, {'served' if served else 'in process'}", bool(served), rows))
        elif name in compared:
            raise ValueError(
                f"--compare: the eval.json of {name} has no acceptance by context. Evaluate that run first."
            )
    return found


def warnings_of_comparison(own: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In what the served figures of other runs were measured otherwise than this run's."""
    mine = own.get("served")
    if mine is None:
        return []
    told = []
    for name, result in compared.items():
        theirs = result.get("served")
        if theirs is None:
            told.append(f"{name} was evaluated in process, this run on a server: these are other rounds")
            continue
        same = ("prompts_fingerprint", "draft_tokens", "max_new_tokens", "ignore_eos", "concurrency")
        other = [key.removesuffix("_fingerprint") for key in same if theirs[key] != mine[key]]
        if other:
            told.append(f"{name} was measured with other {', '.join(other)} than this run")
    return told


def draw_lengths(axis: Axes, lines: Sequence[Curve]) -> None:
    """The acceptance length in each bucket, with its 95% interval where there is one."""
    for place, line, color, marker, buckets in _placed(lines):
        rows = [row for row in line.rows if row["acceptance_length"] is not None]
        places = [buckets.index(_ends(row)) + place for row in rows]
        values = [row["acceptance_length"] for row in rows]
        axis.plot(places, values, color=color, marker=marker, label=line.name)
        for x, row in zip(places, rows, strict=True):
            if row.get("interval") is not None:
                axis.vlines(x, *row["interval"], color=color, linewidth=1.2)
    _axes(axis, lines, "tokens per target forward", "Acceptance against context")
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")


def draw_speeds(axis: Axes, lines: Sequence[Curve]) -> None:
    """Tokens per second while decoding, of one answer, where a server was measured."""
    for _, line, color, marker, buckets in _placed(lines):
        rows = [row for row in line.rows if row.get("decoding_tokens_per_second")]
        places = [buckets.index(_ends(row)) for row in rows]
        if rows:
            values = [row["decoding_tokens_per_second"] for row in rows]
            axis.plot(places, values, color=color, marker=marker, label=line.name)
    _axes(axis, lines, "tokens/s of one answer", "Decoding speed on the server, without reading")


def _placed(lines: Sequence[Curve]) -> list[tuple[float, Curve, str, str, list[tuple[int, int | None]]]]:
    """Each line with its shift, colour and marker, and the buckets of all."""
    buckets = _buckets(lines)
    return [
        (
            (number - (len(lines) - 1) / 2) * SPREAD,
            line,
            COLORS[number % len(COLORS)],
            MARKERS[number % len(MARKERS)],
            buckets,
        )
        for number, line in enumerate(lines)
    ]


def _ends(row: Mapping[str, Any]) -> tuple[int, int | None]:
    return row["above"], row["up_to"]


def _buckets(lines: Sequence[Curve]) -> list[tuple[int, int | None]]:
    """The buckets in which a line has a figure, in the order of their ends; the one without an end last."""
    found = {_ends(row) for line in lines for row in line.rows if row["acceptance_length"] is not None}
    return sorted(found, key=lambda ends: (ends[1] is None, ends[1] or 0, ends[0]))


def _axes(axis: Axes, lines: Sequence[Curve], unit: str, title: str) -> None:
    buckets = _buckets(lines)
    names = [f"≤ {upper:,}" if upper else f"> {lower:,}" for lower, upper in buckets]
    axis.set_xticks(range(len(buckets)), names, fontsize="small")
    axis.set(xlabel="tokens of context (served: of the prompt)", ylabel=unit)
    axis.set_xlim(-0.5, max(len(buckets), 1) - 0.5)
    # Above the legend, which has as many lines as it needs.
    axis.set_title(title, pad=8 + 14 * -(-len(lines) // LINES_ABOVE))
    axis.margins(y=0.15)
    axis.set_ylim(bottom=0)
