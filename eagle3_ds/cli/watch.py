"""`eagle3-ds watch`: how a run is, in the terminal and as a page."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from eagle3_ds.watch import RunReader, RunView

EVERY_SECONDS = 3
PIPE_WIDTH = 10_000
STATE_WIDTH, LINE_WIDTH = 30, 9
STATE = 2
"""Column of the ranks' states."""
SPARKS, LEAST_SPARKS, BESIDE_SPARKS = 48, 8, 62
SHOWN_RANKS = 16
"""Of a live view, whose terminal has an end; those in trouble first."""


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="print the view once and exit")
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="write the view as one page as well, anew at each refresh, e.g. --html run.html",
)
def watch(run: Path, once: bool, html: Path | None) -> None:
    """how a run is: progress, curves, each rank, last messages; of a finished run too

    RUN is the output_dir of a run, e.g. output/quickstart. Only its files are read, so any machine that
    shares them will do. The view ends with the run, or by Ctrl-C; where stdout is no terminal, it is printed
    once.
    """
    from rich.console import Console

    from eagle3_ds.watch import RunReader

    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"--html: {html.absolute().parent} is no folder. Make it, or name another file.")
    if html is not None and html.is_dir():
        raise ValueError(f"--html: {html} is a folder. Name a file in it.")
    # A pipe has no width that a line would have to be cut to.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    reader = RunReader(run)
    view = reader.read()
    if once or view.has_ended or not console.is_terminal:
        _write_page(view, html, None)
    else:
        view = _follow(reader, view, html, console)
    console.print(_drawn(view, len(view.ranks), console.width))


def _follow(reader: RunReader, view: RunView, html: Path | None, console: Console) -> RunView:
    """Show the run until it ends or Ctrl-C comes; returns what was shown last."""
    from rich.live import Live

    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_drawn(view, SHOWN_RANKS, console.width), refresh=True)
                _write_page(view, html, None if view.has_ended else EVERY_SECONDS)
                if view.has_ended:
                    return view
                time.sleep(EVERY_SECONDS)
                view = reader.read()
    except KeyboardInterrupt:
        return view


def _write_page(view: RunView, html: Path | None, refresh_seconds: int | None) -> None:
    """Write the page under another name first: a browser gets it whole."""
    if html is None:
        return
    from eagle3_ds.watch import page

    aside = html.with_name(f".{html.name}")
    aside.write_text(page(view, refresh_seconds), encoding="utf-8")
    os.replace(aside, html)


def _drawn(view: RunView, most_ranks: int, width: int) -> RenderableType:
    """The view from its title to its ranks, which may not all fit on a screen."""
    from rich.console import Group
    from rich.text import Text

    from eagle3_ds.watch import progress_words

    read = time.strftime("%H:%M:%S", time.localtime(view.time))
    return Group(
        Text(view.title, style="bold"),
        Text(view.state),
        Text(progress_words(view.progress)),
        Text(""),
        _curves(view, width),
        Text(""),
        Text("last messages of rank 0", style="bold"),
        *(Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in view.messages),
        Text(""),
        _ranks(view, most_ranks, width),
        Text(f"{view.folder}, read {read}", style="dim"),
    )


def _curves(view: RunView, width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from eagle3_ds.watch import curve_words, sparkline

    if not view.curves:
        return Text("no curve yet")
    table = Table(box=None, pad_edge=False)
    for name in ("curve", "", "last", "first", "lowest", "highest"):
        table.add_column(name, no_wrap=True)
    sparks = min(SPARKS, max(LEAST_SPARKS, width - BESIDE_SPARKS))
    for name, points in view.curves.items():
        told = curve_words(points)
        table.add_row(name, sparkline(points, sparks), told.last, told.first, told.lowest, told.highest)
    return table


def _ranks(view: RunView, most: int, width: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from eagle3_ds.watch.words import RANK_COLUMNS, rank_words

    shown = sorted(view.ranks, key=lambda rank: (not rank.is_troubled, rank.rank))[:most]
    rows = [rank_words(rank, view.time) for rank in shown]
    lengths = [max(map(len, column)) for column in zip(RANK_COLUMNS, *rows, strict=True)]
    lengths[STATE] = min(lengths[STATE], STATE_WIDTH)
    # The last line gets what the others leave: rich would take it from the states, which matter more.
    lengths[-1] = max(LINE_WIDTH, width - sum(lengths[:-1]) - 2 * (len(lengths) - 1))
    table = Table(box=None, pad_edge=False)
    for number, (name, most_wide) in enumerate(zip(RANK_COLUMNS, lengths, strict=True)):
        table.add_column(name, no_wrap=number != STATE, overflow="ellipsis", max_width=most_wide)
    for rank, row in zip(shown, rows, strict=True):
        table.add_row(*map(Text, row), style="red" if rank.is_troubled else "")
    left = len(view.ranks) - len(shown)
    return Group(table, Text(f"{left} more ranks; --once and --html show all")) if left else table
