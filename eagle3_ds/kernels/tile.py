"""A tile of the attention mask, and how it is cut: for backends that know only full rectangles and causal
squares, and for those to which every new size is costly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """A rectangle of the mask: query rows [q_start, q_stop) against key rows [k_start, k_stop).

    Without `causal` and `left` every row sees every key. Otherwise each row sees a band of keys along the
    tile's diagonal, which ends in the bottom right corner: the last row's own key is the last key, the row
    before has the key before. For example the queries of positions 4..7 of a document against its keys 0..7
    are Tile(4, 8, 0, 8, causal=True): row 4 sees the keys 0..4, row 7 all eight.

    Attributes:
        q_start, q_stop, k_start, k_stop: the rectangle.
        causal: a row sees no key after its own.
        left: a row sees no key more than `left` before its own (a sliding window of left + 1 keys); None for
            no such limit.

    A tile with `causal` or `left` has at least as many keys as rows, so that every row sees a key.
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
        """Assert that every row of the tile sees a key. Backends disagree about the log-sum-exp of a row that
        sees none, so no such tile may reach them.
        """
        banded = self.causal or self.left is not None
        assert not banded or (self.num_keys >= self.num_queries and (self.left or 0) >= 0), (
            f"{self} leaves rows without a key"
        )


def cut_into_blocks(tile: Tile, most: int) -> Iterator[Tile]:
    """Cut `tile` into tiles of at most `most` rows and fewer than 2 * `most` keys that show the same pairs.

    Tiles with `left` have other limits. A causal one is cut into blocks of rows, and a block of r rows keeps
    the r + left keys that its band covers. One that is not causal is not cut at all: it is part of a window
    over an earlier block of keys, and each of its rows begins to see at another key, up to the last one.
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
        # The keys before the block's own are full rectangles. The last tile keeps the block's own keys in one
        # piece, because they are the causal triangle.
        own = rows.num_queries if tile.causal else 1
        while rows.num_keys - own >= most:
            yield rows._replace(k_stop=rows.k_start + most, causal=False)
            rows = rows._replace(k_start=rows.k_start + most)
        yield rows


def cut_into_squares(tile: Tile) -> Iterator[Tile]:
    """Cut `tile` into full rectangles, causal squares and mirrored squares that show the same pairs.

    A mirrored square has `left` = 0 and is not causal: row i sees the keys from i on, an upper triangle. A
    sliding window of w keys is cut into groups of w rows. In each group the keys that the window leaves
    behind are a mirrored square, and those that it reaches are a causal square; for w = 3:

        x x | x . .
        . x | x x .
        . . | x x x

    A group of fewer than w rows, and a window over an earlier block of keys, have a full rectangle after the
    mirrored square.
    """
    num_queries, num_keys, causal = tile.num_queries, tile.num_keys, tile.causal
    diagonal = num_keys - num_queries
    left = tile.left if tile.left is not None and tile.left < num_keys - 1 else None
    # The rows before `head` see the first key of the tile: the left edge takes no key from them.
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


def cut_into_powers(tile: Tile, least: int, most: int) -> Iterator[Tile]:
    """Cut `tile` into full rectangles and causal squares whose sides are powers of two, `least` or more, and
    what remains, that show the same pairs. `least` and `most` are powers of two.

    The rows become blocks, the largest first, of at most `most`; the keys before a block become rectangles
    of any such size. So a backend meets few sizes, whatever the lengths of the documents. For least = 2, a
    causal tile of 7 rows is blocks of 4 and 2 rows and a last row that remains:

        x x x x
        x x x x
        x x x x
        x x x x
        y y y y | z z
        y y y y | z z
        r r r r   r r r

    What remains is fewer than `least` rows, which keep all their keys, and the keys before the first whole
    rectangle. A tile with `left` or with fewer rows or keys than `least` remains whole.
    """
    if tile.left is not None or min(tile.num_queries, tile.num_keys) < least:
        yield tile
        return
    # The keys before a causal tile's own are seen by all its rows.
    diagonal = tile.k_stop - tile.num_queries if tile.causal else tile.k_stop
    first = tile.k_start + (diagonal - tile.k_start) % least
    start = tile.q_start
    for rows in _powers(tile.num_queries, least, most):
        block, key = Tile(start, start + rows, 0, 0, False), first
        before = diagonal + start - tile.q_start if tile.causal else diagonal
        for keys in _powers(before - first, least):
            yield block._replace(k_start=key, k_stop=key + keys)
            key += keys
        if tile.causal:
            yield block._replace(k_start=before, k_stop=before + rows, causal=True)
        start += rows
    if first > tile.k_start:
        yield Tile(tile.q_start, start, tile.k_start, first, False)
    if start < tile.q_stop:
        yield tile._replace(q_start=start)


def _powers(length: int, least: int, most: int | None = None) -> Iterator[int]:
    """Powers of two from `least` to `most`, the largest first, whose sum is the largest multiple of `least`
    up to `length`.
    """
    while length >= least:
        size = 1 << (length.bit_length() - 1)
        size = size if most is None else min(size, most)
        yield size
        length -= size
