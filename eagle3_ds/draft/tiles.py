"""The slots of a rank in tiles, so that what is transient fits a byte budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


def slots_per_tile(hidden_size: int, width: int, itemsize: int, tile_bytes: int) -> int:
    """Slots whose transient tensors fit the budget: in backward about 7 of the MLP's width and 8 of the
    hidden size each.

    Raises:
        ValueError: the budget does not hold one slot.
    """
    per_slot = (7 * width + 8 * hidden_size) * itemsize
    if tile_bytes < per_slot:
        raise ValueError(
            f"train.tile_bytes = {tile_bytes} is too small for one slot of a draft layer of width "
            f"{hidden_size} with an MLP of {width}: at least {per_slot} bytes are needed."
        )
    return tile_bytes // per_slot


class Tiles(NamedTuple):
    """The slots of a step in pieces: of the live ones, and of the rest, which step 0 alone has."""

    live: list[slice]
    rest: list[slice]

    @staticmethod
    def cut(num_live: int, num_slots: int, size: int) -> Tiles:
        ranges = ((0, num_live), (num_live, num_slots))
        return Tiles(
            *([slice(a, min(a + size, stop)) for a in range(start, stop, size)] for start, stop in ranges)
        )


def map_tiles(function: Callable[[slice], tuple[Tensor, ...]], tiles: Sequence[slice]) -> tuple[Tensor, ...]:
    """The results of all tiles, rows joined; a tile is written where it belongs as soon as it is computed."""
    first = function(tiles[0])
    if len(tiles) == 1:
        return first
    start = tiles[0].start
    joined = tuple(part.new_empty((tiles[-1].stop - start, *part.shape[1:])) for part in first)
    for tile in tiles:
        for whole, part in zip(joined, first if tile is tiles[0] else function(tile), strict=True):
            whole[tile.start - start : tile.stop - start] = part
    return joined
