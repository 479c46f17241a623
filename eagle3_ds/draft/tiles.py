"""Cutting the slots of a rank into tiles (stretches of consecutive slots), so that the temporary tensors of
one tile fit a byte budget. Not to be confused with a tile of the attention mask (kernels/tile.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


def slots_per_tile(hidden_size: int, width: int, itemsize: int, tile_bytes: int) -> int:
    """How many slots make a tile within `tile_bytes`. In backward a slot needs about 7 temporary vectors of
    the MLP's `width` and 8 of `hidden_size`.

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
    """The tiles of a TTT step.

    Attributes:
        live: of the live slots.
        rest: of the other slots; empty from step 1 on.
    """

    live: list[slice]
    rest: list[slice]

    @staticmethod
    def cut(num_live: int, num_slots: int, size: int) -> Tiles:
        """Cut `num_slots` slots, the first `num_live` of them live, into tiles of at most `size` slots."""
        ranges = ((0, num_live), (num_live, num_slots))
        return Tiles(
            *([slice(a, min(a + size, stop)) for a in range(start, stop, size)] for start, stop in ranges)
        )


def map_tiles(function: Callable[[slice], tuple[Tensor, ...]], tiles: Sequence[slice]) -> tuple[Tensor, ...]:
    """Run `function` on each of some adjacent tiles and join the rows of the results.

    The joined tensors are allocated after the first tile, and each result is copied into them at once, so
    that never two results wait to be concatenated.

    Args:
        function: maps a tile to tensors [t, ...].
        tiles: ascending and adjacent.

    Returns:
        Tensors [n, ...], n the slots of all tiles.
    """
    first = function(tiles[0])
    if len(tiles) == 1:
        return first
    start = tiles[0].start
    joined = tuple(part.new_empty((tiles[-1].stop - start, *part.shape[1:])) for part in first)
    for tile in tiles:
        for whole, part in zip(joined, first if tile is tiles[0] else function(tile), strict=True):
            whole[tile.start - start : tile.stop - start] = part
    return joined
