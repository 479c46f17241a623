"""Many short tiles that see the same keys, cut again so that few calls compute them all.

The answers of a long document are such tiles: each has the rows of one answer and the keys of everything
before it. No two of them can share a variable-length call, because both see the document's beginning. So each
keeps the keys since the answer before it, and what is earlier is cut in halves, again and again: of two
neighbouring halves the rows of the later one see all keys of the earlier one. For four answers:

    a           a . . .   . . . .   . . . .
    a b         . b . .   a . . .   . . . .
    a b c    =  . . c . + . . . . + a b . .
    a b c d     . . . d   . . c .   a b . .

The tiles of one depth share no row and no key, and become one call. 256 answers are 9 calls instead of 256, a
row is in at most 9 of them, and each key is read 9 times instead of up to 256 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from eagle3_ds.kernels.tile import Tile

FEWEST_TILES, LONG_ROWS = 3, 1024
"""Fewer tiles are left as they are, and longer ones: a call of so many rows keeps a GPU busy by itself, and
what is cut must be merged again.
"""


def cut_in_halves(tiles: Iterable[Tile]) -> list[Tile]:
    """Tiles that show the same pairs. Those without neighbours of the same keys come back as they are."""
    found: list[Tile] = []
    for group in _groups(sorted(tiles, key=lambda tile: tile[:4])):
        rows = group[-1].q_stop - group[0].q_start
        if len(group) < FEWEST_TILES or rows > LONG_ROWS * len(group):
            found += group
        else:
            starts = [group[0].k_start, *(tile.k_stop for tile in group[:-1])]
            own = [tile._replace(k_start=start) for tile, start in zip(group, starts, strict=True)]
            found += [*own, *_earlier(own)]
    return found


def _groups(ordered: Iterable[Tile]) -> Iterator[list[Tile]]:
    """Runs of tiles with adjacent rows and the same first key, none of whose own keys is in another's."""
    group: list[Tile] = []
    for tile in ordered:
        if group and not _continues(group[-1], tile):
            yield group
            group = []
        group.append(tile)
    if group:
        yield group


def _continues(before: Tile, tile: Tile) -> bool:
    return (
        before.causal
        and tile.causal
        and before.left is None
        and tile.left is None
        and tile.k_start == before.k_start
        and tile.q_start == before.q_stop
        and tile.k_stop - tile.num_queries >= before.k_stop
    )


def _earlier(own: Sequence[Tile]) -> Iterator[Tile]:
    """The pairs of every row with the keys of all tiles before its own."""
    if len(own) < 2:
        return
    first, second = own[: len(own) // 2], own[len(own) // 2 :]
    yield Tile(second[0].q_start, second[-1].q_stop, first[0].k_start, first[-1].k_stop, causal=False)
    yield from _earlier(first)
    yield from _earlier(second)
