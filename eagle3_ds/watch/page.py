"""A run as one HTML page that needs no other file: curves are SVG within it, and no script runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from eagle3_ds.watch.curves import Points, thinned
from eagle3_ds.watch.reading import RankView, RunView
from eagle3_ds.watch.words import RANK_COLUMNS, curve_words, progress_words, rank_words

WIDTH, HEIGHT, EDGE = 480, 120, 4
MOST_POINTS = 480
TRAINING, HELDOUT = "#0072b2", "#d55e00"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }
.curves { display: flex; flex-wrap: wrap; gap: 1.5em; }
figure { margin: 0; }
figcaption span { color: #666; }
svg { background: #f6f6f6; display: block; max-width: 100%; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2em .6em; border-bottom: 1px solid #ddd; vertical-align: top; }
td.line, pre { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.trouble { color: #b00020; }
"""


def page(view: RunView, refresh_seconds: int | None = None) -> str:
    """The page of a run.

    Args:
        refresh_seconds: after so many seconds a browser loads it again; None: never.
    """
    again = "" if refresh_seconds is None else f'<meta http-equiv="refresh" content="{refresh_seconds}">\n'
    read = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.time))
    curves = "\n".join(_figure(name, points) for name, points in view.curves.items())
    messages = "\n".join(escape(line) for line in view.messages)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{again}<title>{escape(view.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(view.title)}</h1>
<p><strong>{escape(view.state)}</strong></p>
<p>{escape(progress_words(view.progress))}</p>
<div class="curves">
{curves}
</div>
<h2>Ranks</h2>
{_ranks(view.ranks, view.time)}
<h2>Last messages of rank 0</h2>
<pre>{messages}</pre>
<p>{escape(str(view.folder))}, read {read}</p>
</body>
</html>
"""


def _figure(name: str, points: Points) -> str:
    told = curve_words(points)
    return (
        f"<figure>{_svg(name, points)}<figcaption>{escape(name)}: {told.last} "
        f"<span>first {told.first}, lowest {told.lowest}, highest {told.highest}, steps {points[0][0]:,} to "
        f"{points[-1][0]:,}</span></figcaption></figure>"
    )


def _svg(name: str, points: Points) -> str:
    """A curve over the steps, from its lowest to its highest value; a single point is a dot."""
    color = HELDOUT if name.startswith(("held-out", "decoded")) else TRAINING
    places = thinned(points, MOST_POINTS)
    xs = _scaled([step for step, _ in places], EDGE, WIDTH - EDGE)
    ys = _scaled([value for _, value in places], HEIGHT - EDGE, EDGE)
    if len(places) == 1:
        mark = f'<circle cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="3" fill="{color}"/>'
    else:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        mark = f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(name)}">{mark}</svg>'


def _scaled(values: Sequence[float], start: float, end: float) -> list[float]:
    """The values from the lowest to the highest as places from `start` to `end`; equal ones in the middle."""
    low, high = min(values), max(values)
    if high == low:
        return [(start + end) / 2] * len(values)
    return [start + (value - low) / (high - low) * (end - start) for value in values]


def _ranks(ranks: Sequence[RankView], now: float) -> str:
    head = "".join(f"<th>{name}</th>" for name in RANK_COLUMNS)
    rows = [_row(rank, now) for rank in ranks]
    return "\n".join([f"<table>\n<tr>{head}</tr>", *rows, "</table>"])


def _row(rank: RankView, now: float) -> str:
    *cells, line = map(escape, rank_words(rank, now))
    trouble = ' class="trouble"' if rank.is_troubled else ""
    return f'<tr{trouble}>{"".join(f"<td>{cell}</td>" for cell in cells)}<td class="line">{line}</td></tr>'
