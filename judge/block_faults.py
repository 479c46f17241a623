"""Deliberate faults that a draft of blocks shows: patches of the product, which a comparison must reject."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

from torch import Tensor

from eagle3_ds.algorithms.dflash import model
from eagle3_ds.attention import prefix_kv
from eagle3_ds.attention.rotary import RotaryFrequencies
from eagle3_ds.kernels import Tile
from eagle3_ds.layout import SpanPlan


def future_context() -> Any:
    """A block sees the captured state of its own newest token, where its document has one."""
    honest = prefix_kv.gathered_tiles

    def tiles(plan: SpanPlan, ring_rank: int, window: int | None) -> tuple[Tile, ...]:
        found = []
        for tile in honest(plan, ring_rank, window):
            last = tile.k_stop == len(plan.document)
            ends = last or int(plan.document[tile.k_stop - 1] != plan.document[tile.k_stop])
            found.append(tile if ends else tile._replace(k_stop=tile.k_stop + 1))
        return tuple(found)

    return mock.patch.object(prefix_kv, "gathered_tiles", tiles)


def leaking_document() -> Any:
    """Every slot also attends to the documents that come before its own in the pack."""
    honest = prefix_kv.gathered_tiles

    def tiles(plan: SpanPlan, ring_rank: int, window: int | None) -> tuple[Tile, ...]:
        return tuple(tile._replace(k_start=0) for tile in honest(plan, ring_rank, window))

    return mock.patch.object(prefix_kv, "gathered_tiles", tiles)


class _FirstLate:
    """Angles of positions one too large, the first time that they are asked for."""

    def __init__(self, rotary: RotaryFrequencies) -> None:
        self._rotary, self._late = rotary, 1

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        late, self._late = self._late, 0
        return self._rotary.angles(positions + late)


def blocks_too_late() -> Any:
    """The inputs of a block stand one position too late. Those of the context, asked for next, are right."""
    honest: Any = model.run_layers

    def run_layers(*arguments: Any) -> Tensor:
        *before, rotary, settings = arguments
        return honest(*before, cast(RotaryFrequencies, _FirstLate(rotary)), settings)

    return mock.patch.object(model, "run_layers", run_layers)
