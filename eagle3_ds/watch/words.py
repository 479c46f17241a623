"""What is said of a run's figures, the same in the terminal and on a page."""

from __future__ import annotations

from typing import NamedTuple

from eagle3_ds.watch.curves import Points
from eagle3_ds.watch.reading import Progress, RankView

GIB = 2**30
RANK_COLUMNS = ("rank", "host", "state", "peak GiB", "last spoke", "last line")


def progress_words(progress: Progress) -> str:
    """Steps, tokens, speed and time left."""
    of = "" if progress.last is None else f" of {progress.last:,}"
    if not progress.step:
        return f"no step yet{of}"
    share = f" ({progress.step / progress.last:.0%})" if progress.last else ""
    told = [f"step {progress.step:,}{of}{share}", f"{progress.tokens:,} tokens"]
    if progress.tokens_per_s is not None:
        over = "the last step" if progress.over == 1 else f"the last {progress.over} steps"
        told.append(f"{progress.tokens_per_s:,.0f} tokens/s over {over}")
    if progress.seconds_left is not None:
        told.append(f"{duration(progress.seconds_left)} of steps left")
    if progress.skipped:
        told.append(f"{progress.skipped:,} of the steps were not finite and skipped")
    return ", ".join(told)


class CurveWords(NamedTuple):
    """The figures beside a curve."""

    first: str
    last: str
    lowest: str
    highest: str


def curve_words(points: Points) -> CurveWords:
    """Of a curve that has a point."""
    values = [value for _, value in points]
    return CurveWords(*(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values))))


def rank_words(rank: RankView, now: float) -> tuple[str, ...]:
    """A rank by `RANK_COLUMNS`."""
    peak = "" if rank.peak_bytes is None else f"{rank.peak_bytes / GIB:.2f}"
    # The clocks of two hosts differ: who wrote a moment ago may seem to write in the future.
    spoke = "" if rank.spoke is None else f"{_rough(max(0.0, now - rank.spoke))} ago"
    return str(rank.rank), rank.host, rank.state, peak, spoke, rank.last_line


def _rough(seconds: float) -> str:
    """In the largest unit that counts."""
    return " ".join(duration(seconds).split()[:2])


def duration(seconds: float) -> str:
    """In the two largest units that count."""
    whole = round(seconds)
    for name, size, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {lower}"
    return f"{whole} s"
