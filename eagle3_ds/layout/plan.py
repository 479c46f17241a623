"""SpanPlan: how one packed sequence is cut over ring x ulysses ranks.

A *live slot* is a slot whose hidden state some loss reads, at one TTT step or more. All other slots, mostly
those of prompts, make a key and a value at step 0, and nothing else of them is ever computed. So the two
kinds are cut separately, and every rank gets the same number of each.

Each kind is cut into equal *chunks*. Every ring rank gets the same number of chunks, chosen so that the
attention work is even. Any map of chunks to ranks is legal, because every live slot attends to the step-0
keys of all ranks. The chunks of a ring rank, in sequence order, form its *columns*; its Ulysses ranks take
equal contiguous parts of them. A rank's live slots come before its other slots.

Everything here is a pure function of (document lengths, live slots, ring, ulysses, chunks per rank), so the
view of every rank can be computed, and tested, in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
SMALLEST_REST = 16
"""If fewer than one slot in this many is not live, all slots are treated as live."""


class Run(NamedTuple):
    """A stretch of consecutive columns of one ring rank that are consecutive slots of one document. The mask
    of a run is a single tile (attention/tiles.py).

    Attributes:
        column: the first column.
        slot: the first slot of the sequence.
        length: how many columns, and slots.
        document_start: the first slot of the document.
    """

    column: int
    slot: int
    length: int
    document_start: int


def attention_work(position: IntArray, in_document: NDArray[np.bool_], window: int | None = None) -> IntArray:
    """How many step-0 keys each slot attends to, int64 [L]: position + 1, at most `window`; 0 for padding.

    Args:
        position: int64 [L], position of each slot in its document.
        in_document: bool [L], false for padding.
        window: the most keys that a slot sees; None for no limit.
    """
    seen = position + 1 if window is None else np.minimum(position + 1, window)
    return np.where(in_document, seen, 0)


def _cut_into_chunks(slots: int, ring: int, ulysses: int, chunks_per_rank: int) -> tuple[int, int]:
    """The number of chunks that `slots` slots are cut into, and the slots of each chunk, after padding."""
    # One ring rank has nothing to balance, so it gets one chunk. Each chunk is padded to a multiple of
    # `ulysses`, so that the Ulysses ranks can share the columns equally.
    num_chunks = ring * (1 if ring == 1 else chunks_per_rank)
    return num_chunks, _round_up(-(-slots // num_chunks), ulysses)


def slots_of_a_rank(
    length: int, num_live: int, ring: int, ulysses: int, chunks_per_rank: int
) -> tuple[int, int]:
    """How many live slots, and how many slots in all, each sp rank holds of a sequence of `length` tokens,
    `num_live` of them live.

    Every rank gets at least one live slot, so that every rank runs every collective: a rank without queries
    would skip some, and the others would wait for it forever. If fewer than one slot in SMALLEST_REST is not
    live, all slots are treated as live, because reordering the keys would cost more than it saves.
    """
    if (length - num_live) * SMALLEST_REST < length:
        num_live = length
    live = _padded(max(1, num_live), ring, ulysses, chunks_per_rank)
    rest = _padded(max(0, length - live), ring, ulysses, chunks_per_rank)
    return live // (ring * ulysses), (live + rest) // (ring * ulysses)


@dataclass(frozen=True, eq=False)
class SpanPlan:
    """The cut of one packed sequence. Build it with `SpanPlan.make`.

    Attributes:
        lengths: document lengths in tokens, in the order of the pack; their sum is `length`.
        live: int64 [ring, ulysses, Q], the live slots of each sp rank, ascending. All ranks hold equally
            many, so a few slots that no loss reads are counted as live to make the number up.
        rest: int64 [ring, ulysses, S - Q], the other slots of each sp rank, ascending. Slots >= `length` are
            padding, at the end of the last chunks.
        window: the most keys that a slot sees, its own included; it only matters for balancing the work. None
            for no limit.
    """

    lengths: tuple[int, ...]
    live: IntArray
    rest: IntArray
    window: int | None = None

    @staticmethod
    def make(
        lengths: Sequence[int],
        ring: int = 1,
        ulysses: int = 1,
        chunks_per_rank: int = 8,
        live: NDArray[np.bool_] | None = None,
        window: int | None = None,
    ) -> SpanPlan:
        """Plan the cut.

        Args:
            lengths: document lengths in tokens, in the order of the pack; their sum is L.
            ring, ulysses: degrees of the two axes.
            chunks_per_rank: chunks of each kind that a ring rank gets; more of them balance the work better
                and make more, smaller tiles.
            live: bool [L], the live slots; None for all.
            window: the most keys that a slot sees; None for no limit.

        Raises:
            ValueError: there is no document, or one without a token; a degree is below one; or `live` has not
                one entry per token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(
                f"lengths = {list(lengths)[:8]}: a packed sequence needs documents of one token or more."
            )
        if min(ring, ulysses, chunks_per_rank) < 1:
            raise ValueError(
                f"ring = {ring}, ulysses = {ulysses}, chunks_per_rank = {chunks_per_rank}: each must be >= 1."
            )
        length = sum(lengths)
        if live is not None and live.shape != (length,):
            raise ValueError(
                f"live has shape {live.shape}, but the documents of the pack have {length} tokens."
            )
        num_live = length if live is None else int(live.sum())
        live_share, share = slots_of_a_rank(length, num_live, ring, ulysses, chunks_per_rank)
        chosen = np.zeros(ring * ulysses * share, dtype=np.bool_)
        chosen[:length] = True if live is None else live
        # Fill the live slots up to equal shares with the first slots that are not live, then with padding.
        chosen[np.flatnonzero(~chosen)[: ring * ulysses * live_share - num_live]] = True
        work = attention_work(*_positions(lengths, len(chosen)), window)
        of_live, of_rest = (
            _deal(np.flatnonzero(part), work, ring, ulysses, chunks_per_rank) for part in (chosen, ~chosen)
        )
        return SpanPlan(tuple(lengths), of_live, of_rest, window)

    @property
    def ring(self) -> int:
        return self.live.shape[0]

    @property
    def ulysses(self) -> int:
        return self.live.shape[1]

    @property
    def live_per_rank(self) -> int:
        """Q: how many live slots each sp rank holds, the same for all. They are its first slots."""
        return self.live.shape[2]

    @property
    def slots_per_rank(self) -> int:
        """S: how many slots each sp rank holds, the same for all."""
        return self.live.shape[2] + self.rest.shape[2]

    @property
    def columns_per_ring_rank(self) -> int:
        """Slots of one ring rank, over its Ulysses ranks."""
        return self.ulysses * self.slots_per_rank

    @property
    def padded_length(self) -> int:
        """`length` plus the padding that makes all sp ranks' shares equal."""
        return self.live.size + self.rest.size

    @property
    def length(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    @cached_property
    def position(self) -> IntArray:
        """int64 [padded_length]: position of each slot in its document; 0 for padding."""
        return _positions(self.lengths, self.padded_length)[0]

    @cached_property
    def document(self) -> IntArray:
        """int64 [padded_length]: index of each slot's document; -1 for padding."""
        document = np.full(self.padded_length, -1, dtype=np.int64)
        document[: self.length] = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return document

    @cached_property
    def ring_slots(self) -> IntArray:
        """int64 [ring, columns_per_ring_rank]: the slot in each column of each ring rank."""
        return np.concatenate((self.live, self.rest), axis=2).reshape(self.ring, -1)

    @cached_property
    def sequence_order(self) -> IntArray:
        """int64 [padded_length]: where each slot is in the concatenation of all ring ranks' columns. Indexing
        gathered columns with it puts them in sequence order.
        """
        order = np.empty(self.padded_length, dtype=np.int64)
        order[self.ring_slots.reshape(-1)] = np.arange(self.padded_length)
        return order

    @property
    def in_sequence_order(self) -> bool:
        """Whether the columns are in sequence order already: nothing must be gathered or reordered then."""
        return self.ring == 1 and not self.rest.size

    def slots(self, ring_rank: int, ulysses_rank: int) -> IntArray:
        """int64 [slots_per_rank]: the slots of this sp rank in the order of its columns, live ones first."""
        return np.concatenate((self.live[ring_rank, ulysses_rank], self.rest[ring_rank, ulysses_rank]))

    def runs(self, ring_rank: int) -> tuple[Run, ...]:
        """All columns of the ring rank as runs, without padding. A run has only live slots or only others."""
        if not self.rest.size:
            return self.live_runs(ring_rank)
        peers = zip(self.live[ring_rank], self.rest[ring_rank], strict=True)
        return self._runs(part for parts in peers for part in parts)

    def live_runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The live columns of the ring rank as runs. `column` counts live columns only; the slots of each run
        are also those of one run of `runs`.
        """
        live = self.live[ring_rank]
        return self._runs(live if self.rest.size else [live.reshape(-1)])

    def _runs(self, parts: Iterable[IntArray]) -> tuple[Run, ...]:
        """Cut the concatenation of `parts` (int64 slots) into runs. A run ends where a part ends."""
        runs, column = [], 0
        for slots in parts:
            document = self.document[slots]
            breaks = (np.diff(slots) != 1) | (np.diff(document) != 0)
            starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
            stops = np.concatenate((starts[1:], [len(slots)]))
            runs += [
                Run(int(column + a), int(slots[a]), int(b - a), int(slots[a] - self.position[slots[a]]))
                for a, b in zip(starts, stops, strict=True)
                if document[a] >= 0
            ]
            column += len(slots)
        return tuple(runs)

    def halo_slots(self, ring_rank: int, ulysses_rank: int, halo: int) -> IntArray:
        """int64 [E], ascending: the slots whose tokens and teacher rows this sp rank reads. Each of its spans
        [s, e) is widened to [s, e + halo), and overlaps are merged.

        The result may contain slots >= `length`; `LocalRows` reads them as zeros.
        """
        return np.unique(self.slots(ring_rank, ulysses_rank)[:, None] + np.arange(halo + 1))

    def teacher_slots(self, ring_rank: int, ulysses_rank: int, halo: int) -> IntArray:
        """int64, ascending: the slots whose teacher rows this sp rank reads, those 1 to `halo` after one of
        its live slots. Padding is left out.
        """
        ahead = np.unique(self.live[ring_rank, ulysses_rank][:, None] + 1 + np.arange(halo))
        return ahead[ahead < self.length]

    def ring_work(self) -> IntArray:
        """int64 [ring]: query-key pairs of each ring rank's live slots in the attention to step-0 keys."""
        work = attention_work(self.position, self.document >= 0, self.window)
        return work[self.live].sum((1, 2))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _padded(slots: int, ring: int, ulysses: int, chunks_per_rank: int) -> int:
    num_chunks, size = _cut_into_chunks(slots, ring, ulysses, chunks_per_rank)
    return num_chunks * size


def _positions(lengths: Sequence[int], padded_length: int) -> tuple[IntArray, NDArray[np.bool_]]:
    sizes = np.asarray(lengths, dtype=np.int64)
    total = int(sizes.sum())
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.zeros(padded_length, dtype=np.int64)
    position[:total] = np.arange(total) - starts
    return position, np.arange(padded_length) < total


def _deal(slots: IntArray, work: IntArray, ring: int, ulysses: int, chunks_per_rank: int) -> IntArray:
    """Distribute slots, int64 [n] with n a multiple of the chunk size, over the sp ranks.

    Returns int64 [ring, ulysses, n / (ring * ulysses)]. `work` is the attention work of every slot of the
    sequence, `attention_work`.
    """
    num_chunks, size = _cut_into_chunks(len(slots), ring, ulysses, chunks_per_rank)
    chunks = slots.reshape(num_chunks, size)
    owner = np.asarray(_balance(work[chunks].sum(1), ring))
    return np.stack([chunks[owner == rank].reshape(ulysses, -1) for rank in range(ring)])


def _balance(work: IntArray, ring: int) -> tuple[int, ...]:
    """The ring rank of each chunk. In order of falling work, a chunk goes to the rank with the least work so
    far that has not its full number of chunks yet (longest-processing-time scheduling).
    """
    capacity = len(work) // ring
    owner = np.zeros(len(work), dtype=np.int64)
    count = [0] * ring
    # A heap of (load, rank) of the ranks with room: a ring of hundreds has tens of thousands of chunks.
    with_room = [(0, rank) for rank in range(ring)]
    for chunk in sorted(range(len(work)), key=lambda c: (-int(work[c]), c)):
        load, rank = heappop(with_room)
        owner[chunk] = rank
        count[rank] += 1
        if count[rank] < capacity:
            heappush(with_room, (load + int(work[chunk]), rank))
    return tuple(int(rank) for rank in owner)
