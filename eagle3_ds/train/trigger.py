"""When a draft should be trained again, and for how many steps: decisions without a clock or a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class FallingAcceptance:
    """Says when a draft has gone stale, by what the server accepts of it.

    The acceptance length of a window of drafting rounds is 1 + accepted tokens / rounds: how many tokens a
    round brought. Training is wanted from when it falls below `low` until it is `high` again; in between the
    answer stays as it was, so that noise around one number does not start and stop it.

    Args:
        window: how many of the last rounds count, at least. No answer changes before there are as many.
        low, high: acceptance lengths, 1 <= low < high.

    Raises:
        ValueError: the numbers are none of these.
    """

    def __init__(self, window: int, low: float, high: float) -> None:
        if window < 1:
            raise ValueError(f"window is {window}: it is a number of drafting rounds, at least 1")
        if not 1 <= low < high:
            raise ValueError(
                f"low is {low} and high is {high}: acceptance lengths begin at 1, and training that begins "
                "below low ends at high, which must be more. Choose 1 <= low < high"
            )
        self.window, self.low, self.high = window, low, high
        self.is_wanted = False
        self._seen: deque[tuple[int, int]] = deque()
        self._rounds, self._accepted = 0, 0

    @property
    def acceptance_length(self) -> float | None:
        """Of the window; None before the window is full."""
        return 1 + self._accepted / self._rounds if self._rounds >= self.window else None

    def observe(self, rounds: int, accepted: int) -> bool:
        """Add what a server counted since the last call: drafting rounds, and tokens accepted in them.

        Returns:
            Whether training is wanted.

        Raises:
            ValueError: a count below 0, as after a restart of the server, or tokens without a round.
        """
        if rounds < 0 or accepted < 0 or (accepted and not rounds):
            raise ValueError(
                f"{rounds} rounds with {accepted} accepted tokens: give what was counted since the last "
                "call, from 0 again after a restart of the server"
            )
        self._seen.append((rounds, accepted))
        self._rounds, self._accepted = self._rounds + rounds, self._accepted + accepted
        while self._rounds - self._seen[0][0] >= self.window:
            old = self._seen.popleft()
            self._rounds, self._accepted = self._rounds - old[0], self._accepted - old[1]
        length = self.acceptance_length
        if length is not None:
            self.is_wanted = length < self.low or (self.is_wanted and length < self.high)
        return self.is_wanted

    def forget(self) -> None:
        """Empty the window: what follows is counted of another draft, or of another policy."""
        self._seen.clear()
        self._rounds, self._accepted = 0, 0


def steps_in(seconds: float, step_seconds: Sequence[float], available: int) -> int:
    """How many whole steps fit into `seconds`, by the slowest of the step times measured last, and of
    `available` ones at most. 0 when nothing was measured.
    """
    if not step_seconds or seconds <= 0:
        return 0
    return min(available, int(seconds / max(step_seconds)))
