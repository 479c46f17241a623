"""The step-0 mask as tiles, enumerated from the plan: causal within each document, never an L x L mask.

A sliding window of w tokens, as transformers counts it, lets slot i see the keys i - w < j <= i.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from eagle3_ds.kernels import Tile
from eagle3_ds.layout import Run, SpanPlan

Made = TypeVar("Made")


def gathered_tiles(
    plan: SpanPlan, ring_rank: int, window: int | None = None, live: bool = True
) -> tuple[Tile, ...]:
    """Tiles of this ring rank's live columns against all keys in sequence order: one bottom-right causal tile
    per run.

    Keys before the window of a run's first row are left out. Without `live` all columns look.

    Raises:
        ValueError: a window of less than one token.
    """
    left = _left(window)
    return tuple(
        Tile(
            run.column,
            run.column + run.length,
            run.document_start if left is None else max(run.document_start, run.slot - left),
            run.slot + run.length,
            True,
            left,
        )
        for run in (plan.live_runs(ring_rank) if live else plan.runs(ring_rank))
    )


def block_tiles(plan: SpanPlan, ring_rank: int, source: int, window: int | None = None) -> tuple[Tile, ...]:
    """Tiles of this ring rank's live columns against the key block of ring rank `source`, in that rank's
    column order.

    Rows and keys of which nothing is visible are left out.

    Raises:
        ValueError: a window of less than one token.
    """
    left = _left(window)
    keys_of: dict[int, list[Run]] = defaultdict(list)
    for run in plan.runs(source):
        keys_of[run.document_start].append(run)
    tiles: list[Tile] = []
    for query in plan.live_runs(ring_rank):
        for key in keys_of[query.document_start]:
            # Live runs are runs, and runs never overlap, so one of keys lies wholly before, at, or after one
            # of queries.
            if key.slot == query.slot:
                tiles.append(
                    Tile(
                        query.column,
                        query.column + query.length,
                        key.column,
                        key.column + key.length,
                        True,
                        left,
                    )
                )
            elif key.slot < query.slot:
                tiles.extend(_earlier_tiles(query, key, left))
    return tuple(tiles)


class StepTiles(Generic[Made]):
    """The tiles of each TTT step, made when first asked for.

    A window of w keys holds the k diagonals of step k, which are the newest, and so w - k keys of step 0.
    Without a window all steps have the same tiles.
    """

    def __init__(self, make: Callable[[int | None], Made], window: int | None) -> None:
        self._make, self._window = make, window
        self._made: dict[int | None, Made] = {}

    def at(self, step: int) -> Made:
        """Raises ValueError for a window that ends before the step's own slot."""
        left = None if self._window is None else self._window - step
        if left not in self._made:
            self._made[left] = self._make(left)
        return self._made[left]


def _earlier_tiles(query: Run, key: Run, left: int | None) -> Iterator[Tile]:
    """Rows against an earlier run of keys: all of it for the rows near enough, then a left edge that moves
    with the row.
    """
    # Row i sees the keys from i + edge on; the rows from `last` on see none.
    edge = -query.length if left is None else query.slot - key.slot - left
    last = max(0, min(query.length, key.length - edge))
    first = last if last + edge <= 1 else max(0, -edge)
    k_stop = key.column + key.length
    if first > 0:
        yield Tile(query.column, query.column + first, key.column, k_stop, False)
    if first < last:
        k_start = key.column + first + edge
        yield Tile(
            query.column + first,
            query.column + last,
            k_start,
            k_stop,
            False,
            k_stop - k_start - (last - first),
        )


def _left(window: int | None) -> int | None:
    """Keys before its own that a slot sees; None for all of its document."""
    if window is not None and window < 1:
        raise ValueError(
            f"window = {window}: a slot sees at least itself. Use a window of 1 token or more, or no window."
        )
    return None if window is None else window - 1
