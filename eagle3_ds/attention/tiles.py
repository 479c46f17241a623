"""The mask of the step-0 keys as tiles, made from the runs of the plan (layout/plan.py): causal within each
document, without ever building an L x L mask.

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
    """Tiles of this ring rank's columns against all keys in sequence order: one causal tile per run, from the
    start of its document to its end.

    Args:
        plan: the cut of the sequence.
        ring_rank: whose columns.
        window: of w keys: those before the window of the run's first row are left out. None for no limit.
        live: only the live columns have queries; False: all columns.

    Raises:
        ValueError: `window` is less than one.
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
    """Tiles of this ring rank's live columns against the keys of ring rank `source`, in the order of that
    rank's columns. Rows that see none of these keys, and keys that no row sees, are in no tile.

    Raises:
        ValueError: `window` is less than one.
    """
    left = _left(window)
    keys_of: dict[int, list[Run]] = defaultdict(list)
    for run in plan.runs(source):
        keys_of[run.document_start].append(run)
    tiles: list[Tile] = []
    for query in plan.live_runs(ring_rank):
        for key in keys_of[query.document_start]:
            # Runs never overlap and every live run is a run, so a run of keys is the run of queries itself,
            # or lies entirely before it (seen), or entirely after it (hidden).
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

    The k diagonal keys of step k are the newest keys of a slot, so a window of w keys leaves w - k of them to
    step 0. Without a window all steps have the same tiles.

    Args:
        make: returns the tiles for a window, or for None.
        window: of the draft's attention.
    """

    def __init__(self, make: Callable[[int | None], Made], window: int | None) -> None:
        self._make, self._window = make, window
        self._made: dict[int | None, Made] = {}

    def at(self, step: int) -> Made:
        """The tiles of TTT step `step`.

        Raises:
            ValueError: the diagonals of the step fill the window.
        """
        left = None if self._window is None else self._window - step
        if left not in self._made:
            self._made[left] = self._make(left)
        return self._made[left]


def _earlier_tiles(query: Run, key: Run, left: int | None) -> Iterator[Tile]:
    """Rows of one run against an earlier run of keys: one full tile for the rows whose window covers all
    these keys, then one tile with `left` for the rows whose window covers only the last of them.
    """
    # Row i of the queries sees the keys from i + edge on: rows before `first` see all, from `last` on none.
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
    """How many keys before its own a slot sees: window - 1, or None for all of its document."""
    if window is not None and window < 1:
        raise ValueError(
            f"window = {window}: a slot sees at least itself. Use a window of 1 token or more, or no window."
        )
    return None if window is None else window - 1
