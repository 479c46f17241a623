"""What the package says while it works: lines through `logging`, progress through tqdm. Both reach a terminal
and a log file in a shape that can be read there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Between two lines of progress where nobody watches a bar move."""
PACKAGE = "eagle3_ds"


@contextmanager
def telling(level: str, rank: int | None = None) -> Iterator[None]:
    """Show what the package logs: plain lines on stdout, warnings and errors on stderr.

    What was set up before is in force again afterwards, so a program that calls ours keeps its own logging.

    Args:
        level: `debug`, `info`, `warning` or `error`, as `logging.level` in a recipe.
        rank: of this process in a run; None when it is no rank. Rank 0 tells everything, the other ranks only
            warnings and errors; those say of which rank they are.
    """
    logger, handler = logging.getLogger(PACKAGE), _Lines(rank)
    before = logger.level, logger.propagate
    least = int(getattr(logging, level.upper()))
    logger.setLevel(max(least, logging.WARNING) if rank else least)
    # A library that has called logging.basicConfig would say every line a second time.
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Lines(logging.Handler):
    """Writes to the sys.stdout and sys.stderr of the moment, above a progress bar that is being drawn."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._prefix = "" if rank is None else f"[rank {rank}] "

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        try:
            tqdm.write((self._prefix if is_warning else "") + self.format(record), file=stream)
            stream.flush()
        except Exception:
            self.handleError(record)


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A tqdm bar, by tqdm's own arguments.

    Where stderr is no terminal, such as in the log of a rank, it becomes whole lines, one in ten seconds at
    most besides the last; where `logging.level` is above info, nothing.
    """
    if not sys.stderr.isatty():
        options |= {"file": _WholeLines(sys.stderr), "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    if logging.getLogger(PACKAGE).level > logging.INFO:
        options["disable"] = True
    return tqdm(*arguments, **options)


class _WholeLines:
    """Takes what tqdm would write over its line, and writes it as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.encoding = getattr(stream, "encoding", None)
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()
