"""The step-0 mask as tiles, enumerated from the plan: causal within each document, never an L x L mask."""

from __future__ import annotations

from collections import defaultdict

from eagle3_ds.kernels import Tile
from eagle3_ds.layout import Run, SpanPlan


def gathered_tiles(plan: SpanPlan, ring_rank: int) -> tuple[Tile, ...]:
    """Tiles of this ring rank's columns against all keys in sequence order: one bottom-right causal tile per run."""
    return tuple(
        Tile(run.column, run.column + run.length, run.document_start, run.slot + run.length, True) for run in plan.runs(ring_rank)
    )


def block_tiles(plan: SpanPlan, ring_rank: int, source: int) -> tuple[Tile, ...]:
    """Tiles of this ring rank's columns against the key block of ring rank `source`, in that rank's column order."""
    keys_of: dict[int, list[Run]] = defaultdict(list)
    for run in plan.runs(source):
        keys_of[run.document_start].append(run)
    tiles = []
    for query in plan.runs(ring_rank):
        for key in keys_of[query.document_start]:
            # Runs of two ranks never overlap, so a run of keys lies wholly before, at, or after a run of queries.
            if key.slot <= query.slot:
                tiles.append(
                    Tile(
                        query.column,
                        query.column + query.length,
                        key.column,
                        key.column + key.length,
                        key.slot == query.slot,
                    )
                )
    return tuple(tiles)
