"""A tile of the attention mask, and how it is cut for backends that know only rectangles and triangles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows [q_start, q_stop) see key rows [k_start, k_stop), or a band of them along the tile's
    diagonal.

    The diagonal is aligned at the bottom right: the last query row's own key is the last of the tile, the row
    before it has the key before. `causal`: a row sees no key after its own. `left`: a row sees no key more
    than `left` before its own. A tile with either has at least as many keys as query rows, so that no row of
    it is empty.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    left: int | None = None

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        return self.k_stop - self.k_start

    def check(self) -> None:
        """Our own invariant: no row of a tile is empty."""
        banded = self.causal or self.left is not None
        assert not banded or (self.num_keys >= self.num_queries and (self.left or 0) >= 0), (
            f"{self} leaves rows without a key"
        )


def cut_into_blocks(tile: Tile, most: int) -> Iterator[Tile]:
    """The pairs of `tile` in tiles of at most `most` rows and less than twice as many keys.

    A tile with a left edge keeps its keys: they are few where it is causal, and a moving edge all the way
    where it is not.
    """
    if tile.left is not None and not tile.causal:
        yield tile
        return
    for start in range(tile.q_start, tile.q_stop, most):
        stop = min(start + most, tile.q_stop)
        rows = tile._replace(q_start=start, q_stop=stop)
        if tile.causal:
            rows = rows._replace(k_stop=tile.k_stop - (tile.q_stop - stop))
        if tile.left is not None:
            yield rows._replace(k_start=max(rows.k_start, rows.k_stop - rows.num_queries - tile.left))
            continue
        # The rows' own keys stay together, behind full rectangles.
        own = rows.num_queries if tile.causal else 1
        while rows.num_keys - own >= most:
            yield rows._replace(k_stop=rows.k_start + most, causal=False)
            rows = rows._replace(k_start=rows.k_start + most)
        yield rows


def cut_into_squares(tile: Tile) -> Iterator[Tile]:
    """The pairs of `tile` as full rectangles, causal squares, and their mirror image, squares with `left` 0.

    A band is walked down in steps as high as it is wide: each step is a causal square at its right edge, a
    mirrored one at its left edge, and the rectangle between them.
    """
    num_queries, num_keys, causal = tile.num_queries, tile.num_keys, tile.causal
    diagonal = num_keys - num_queries
    left = tile.left if tile.left is not None and tile.left < num_keys - 1 else None
    # The rows above `head` reach back to the first key, so that the left edge takes nothing from them.
    head = num_queries if left is None else max(0, left - diagonal)
    parts = [Tile(0, head, 0, diagonal if causal else num_keys, False)]
    if causal:
        parts.append(Tile(0, head, diagonal, diagonal + head, True))
    if left is not None:
        edge = diagonal - left
        height = left + 1 if causal else num_queries
        for start in range(head, num_queries, height):
            last = min(start + height, num_queries) - 1
            parts.append(Tile(start, last, start + edge, last + edge, False, 0))
            parts.append(Tile(start, last + 1, last + edge, start + diagonal if causal else num_keys, False))
            if causal:
                parts.append(Tile(start, last + 1, start + diagonal, last + 1 + diagonal, True))
    q, k = tile.q_start, tile.k_start
    for part in parts:
        if part.num_queries > 0 and part.num_keys > 0:
            yield Tile(
                q + part.q_start, q + part.q_stop, k + part.k_start, k + part.k_stop, part.causal, part.left
            )
