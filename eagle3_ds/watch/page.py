"""A run as one HTML page that needs no other file: curves are SVG within it, and no script runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from eagle3_ds.colors import BLUE, ORANGE, SKY, VERMILION
from eagle3_ds.watch.curves import Points, thinned
from eagle3_ds.watch.reading import RankView, RunView
from eagle3_ds.watch.words import RANK_COLUMNS, curve_words, progress_words, rank_words

WIDTH, HEIGHT, EDGE = 480, 120, 4
MOST_POINTS = 480
STYLE = f"""
:root {{
  color-scheme: light dark;
  --ground: #ffffff; --text: #111111; --faint: #5f5f5f; --rule: #dddddd; --field: #f6f6f6;
  --training: {BLUE}; --heldout: {VERMILION}; --trouble: #b00020;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #16181c; --text: #e8e8e8; --faint: #a8a8a8; --rule: #44474d; --field: #23262b;
    --training: {SKY}; --heldout: {ORANGE}; --trouble: #ff8a80;
  }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }}
body {{ background: var(--ground); color: var(--text); }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; }}
.curves {{ display: grid; gap: 1.5em; }}
.curves {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 30em), 1fr)); }}
figure {{ margin: 0; }}
figcaption span {{ color: var(--faint); }}
svg {{ background: var(--field); display: block; width: 100%; height: auto; }}
polyline {{ stroke: var(--training); stroke-width: 1.5; }}
circle {{ fill: var(--training); }}
.heldout polyline {{ stroke: var(--heldout); }}
.heldout circle {{ fill: var(--heldout); }}
.ranks {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .2em .6em; border-bottom: 1px solid var(--rule); vertical-align: top; }}
th, td:not(.state, .line) {{ white-space: nowrap; }}
td.line, pre {{ font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }}
td.line {{ min-width: 20em; }}
td.state {{ min-width: 12em; overflow-wrap: anywhere; }}
.trouble {{ color: var(--trouble); }}
"""
"""Light and dark, as the reader's browser asks for."""


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
    kind = "heldout" if name.startswith(("held-out", "decoded")) else "training"
    places = thinned(points, MOST_POINTS)
    xs = _scaled([step for step, _ in places], EDGE, WIDTH - EDGE)
    ys = _scaled([value for _, value in places], HEIGHT - EDGE, EDGE)
    if len(places) == 1:
        mark = f'<circle cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="3"/>'
    else:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        mark = f'<polyline points="{line}" fill="none"/>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="{kind}" {size} role="img" aria-label="{escape(name)}">{mark}</svg>'


def _scaled(values: Sequence[float], start: float, end: float) -> list[float]:
    """The values from the lowest to the highest as places from `start` to `end`; equal ones in the middle."""
    low, high = min(values), max(values)
    if high == low:
        return [(start + end) / 2] * len(values)
    return [start + (value - low) / (high - low) * (end - start) for value in values]


def _ranks(ranks: Sequence[RankView], now: float) -> str:
    head = "".join(f"<th>{name}</th>" for name in RANK_COLUMNS)
    rows = [_row(rank, now) for rank in ranks]
    return "\n".join([f'<div class="ranks">\n<table>\n<tr>{head}</tr>', *rows, "</table>\n</div>"])


def _row(rank: RankView, now: float) -> str:
    words = zip(RANK_COLUMNS, rank_words(rank, now), strict=True)
    cells = [f'<td class="{name.rpartition(" ")[2]}">{escape(word)}</td>' for name, word in words]
    trouble = ' class="trouble"' if rank.is_troubled else ""
    return f"<tr{trouble}>{''.join(cells)}</tr>"
