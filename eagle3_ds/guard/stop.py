"""Requests to stop a run between two steps: signals, and the recipe's time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIMEOUT = "train.timeout_minutes"
# What ranks tell each other is a position in here; 0 is no request.
REASONS = ("", *(one.name for one in SIGNALS), TIMEOUT)


class StopRequest:
    """Notes a request while it is entered; the loop asks for it between steps, where all ranks agree.

    The first SIGINT is noted, a second one ends the process at once.

    Args:
        timeout_minutes: the time limit, counted from now; None for none, and on all ranks but one, because
            clocks differ.
    """

    def __init__(self, timeout_minutes: float | None = None) -> None:
        self._deadline = None if timeout_minutes is None else time.monotonic() + 60 * timeout_minutes
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted = self._noted or REASONS.index(signal.Signals(number).name)
        if number == signal.SIGINT:
            # Left to the system: a handler of ours would not run while the main thread waits inside a
            # collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def reason(self) -> int:
        """What this rank knows, as a position in `REASONS`."""
        if not self._noted and self._deadline is not None and time.monotonic() >= self._deadline:
            self._noted = REASONS.index(TIMEOUT)
        return self._noted
