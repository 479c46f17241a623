"""Requests to stop a run between two steps: signals, and the recipe's time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIMEOUT = "train.timeout_minutes"
# Ranks exchange an index into this tuple; 0 means no request.
REASONS = ("", *(one.name for one in SIGNALS), TIMEOUT)


class StopRequest:
    """Inside its `with` block, notes SIGINT, SIGTERM and SIGUSR1 instead of ending the process. Between steps
    the loop reads `reason`, and all ranks agree on it. A second SIGINT ends the process at once.

    When the block has ended without an exception, the process is about to end, and ignores these signals: a
    request reaches the ranks at different times, so that a rank may be told to stop after all have stopped.

    Args:
        timeout_minutes: time limit, counted from now; None for no limit. Only rank 0 gets it: clocks differ,
            and one rank's request stops all.
    """

    def __init__(self, timeout_minutes: float | None = None) -> None:
        self._deadline = None if timeout_minutes is None else time.monotonic() + 60 * timeout_minutes
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if error is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted = self._noted or REASONS.index(signal.Signals(number).name)
        if number == signal.SIGINT:
            # The default action ends the process at any time. A Python handler would not run while the main
            # thread waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def reason(self) -> int:
        """The request that this rank has noted, as an index into `REASONS`; 0 for none."""
        if not self._noted and self._deadline is not None and time.monotonic() >= self._deadline:
            self._noted = REASONS.index(TIMEOUT)
        return self._noted
