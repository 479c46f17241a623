"""SpanPlan: how one packed sequence is cut over ring x ulysses.

A slot is *live* when the loss reads its hidden state at some TTT step. The others, prompts mostly, are looked
at but never look: all they give is a key and a value at step 0, and nothing else of them is ever computed. So
live slots and the rest are cut apart, and every rank holds as many of each as any other.

Both are cut into equal chunks. Each ring rank gets the same number of chunks, chosen so that the attention
work is even; because the step-0 keys are gathered (or streamed) as a whole, any chunk-to-rank map is legal.
Within a ring rank, the chunks in sequence order form its *columns*, and its Ulysses peers take equal
contiguous parts of them: of the live ones first, then of the rest. So a rank's live slots are its first ones.

Everything here is a pure function of (document lengths, live slots, ring, ulysses, chunks per rank), so every
rank's view can be computed, and tested, in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
SMALLEST_REST = 16


class Run(NamedTuple):
    """A stretch of one ring rank's columns that is contiguous in the sequence and lies in one document.

    `column` is the first column, `slot` the first slot, `length` the number of both, `document_start` the
    first slot of the document.
    """

    column: int
    slot: int
    length: int
    document_start: int


def attention_work(position: IntArray, in_document: NDArray[np.bool_], window: int | None = None) -> IntArray:
    """Keys that the step-0 attention of each slot reads: position in its document + 1, at most `window`; none
    for padding.

    Shape [L].
    """
    seen = position + 1 if window is None else np.minimum(position + 1, window)
    return np.where(in_document, seen, 0)


def _cut_into_chunks(slots: int, ring: int, ulysses: int, chunks_per_rank: int) -> tuple[int, int]:
    """Chunks that so many slots are cut into, and slots of each; their product is `slots`, padded."""
    # One ring rank has nothing to balance. Chunks shorter than `ulysses` slots cannot be shared by its peers.
    num_chunks = ring * (1 if ring == 1 else chunks_per_rank)
    return num_chunks, _round_up(-(-slots // num_chunks), ulysses)


def slots_of_a_rank(
    length: int, num_live: int, ring: int, ulysses: int, chunks_per_rank: int
) -> tuple[int, int]:
    """Live slots and all slots that each sp rank holds of a sequence of `length` tokens, `num_live` of them
    live.

    A rank has at least one live slot, so that all ranks run every collective. Where fewer than one slot in
    SMALLEST_REST is not live, all are cut alike: sorting the keys would cost more than is saved.
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
        live: int64 [ring, ulysses, Q], the live slots of each sp rank, ascending; a few others among them,
            that even it out.
        rest: int64 [ring, ulysses, S - Q], its other slots, ascending. Padding is at the end of all.
        window: keys that a slot sees at most, its own among them, as far as work is concerned; None: all
            before it.
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
            live: [L], the slots whose hidden states are wanted; None for all of them.
            window: of the attention whose work is balanced.

        Raises:
            ValueError: no document, a document without a token, a degree below one, or another number of
                slots in `live`.
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
        # Others even out the live slots, padding when there are no others left.
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
        """Live slots that each sp rank holds, its first ones; the same for all."""
        return self.live.shape[2]

    @property
    def slots_per_rank(self) -> int:
        """Slots that each sp rank holds, the same for all."""
        return self.live.shape[2] + self.rest.shape[2]

    @property
    def columns_per_ring_rank(self) -> int:
        return self.ulysses * self.slots_per_rank

    @property
    def padded_length(self) -> int:
        """`length` and the padding that makes every sp rank's share the same."""
        return self.live.size + self.rest.size

    @property
    def length(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    @cached_property
    def position(self) -> IntArray:
        """Position of each slot in its document; 0 for padding. Shape [padded_length]."""
        return _positions(self.lengths, self.padded_length)[0]

    @cached_property
    def document(self) -> IntArray:
        """Document of each slot, -1 for padding. Shape [padded_length]."""
        document = np.full(self.padded_length, -1, dtype=np.int64)
        document[: self.length] = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return document

    @cached_property
    def ring_slots(self) -> IntArray:
        """Slot of each column of each ring rank, shape [ring, columns_per_ring_rank]."""
        return np.concatenate((self.live, self.rest), axis=2).reshape(self.ring, -1)

    @cached_property
    def sequence_order(self) -> IntArray:
        """Row of each slot in the rank-by-rank concatenation of all ring ranks' columns. Shape
        [padded_length].
        """
        order = np.empty(self.padded_length, dtype=np.int64)
        order[self.ring_slots.reshape(-1)] = np.arange(self.padded_length)
        return order

    @property
    def in_sequence_order(self) -> bool:
        """Whether that concatenation is the sequence as it is."""
        return self.ring == 1 and not self.rest.size

    def slots(self, ring_rank: int, ulysses_rank: int) -> IntArray:
        """Slots that this sp rank holds, in the order of its columns, the live ones first. Shape
        [slots_per_rank].
        """
        return np.concatenate((self.live[ring_rank, ulysses_rank], self.rest[ring_rank, ulysses_rank]))

    def runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The ring rank's columns as runs, padding left out. Where there is a rest, a run is live or it is
        not.
        """
        if not self.rest.size:
            return self.live_runs(ring_rank)
        peers = zip(self.live[ring_rank], self.rest[ring_rank], strict=True)
        return self._runs(part for parts in peers for part in parts)

    def live_runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The ring rank's live columns as runs. The columns are counted among the live ones, and the runs are
        runs of `runs`.
        """
        live = self.live[ring_rank]
        return self._runs(live if self.rest.size else [live.reshape(-1)])

    def _runs(self, parts: Iterable[IntArray]) -> tuple[Run, ...]:
        """Runs of the columns that the parts make one after the other; a run does not reach from one part
        into the next.
        """
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
        """Slots whose constants this sp rank reads: each span [s, e) widened to [s, e + halo), overlaps
        merged, ascending.

        Slots at or beyond `padded_length` stand for nothing and are treated as padding by the cutter.
        """
        return np.unique(self.slots(ring_rank, ulysses_rank)[:, None] + np.arange(halo + 1))

    def teacher_slots(self, ring_rank: int, ulysses_rank: int, halo: int) -> IntArray:
        """Slots whose teacher this sp rank reads: those 1 to `halo` ahead of its live ones, ascending,
        no padding.
        """
        ahead = np.unique(self.live[ring_rank, ulysses_rank][:, None] + 1 + np.arange(halo))
        return ahead[ahead < self.length]

    def ring_work(self) -> IntArray:
        """Step-0 attention work (query-key pairs) of each ring rank's live slots. Shape [ring]."""
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
    """Slots, as many as chunks hold, over the sp ranks: [ring, ulysses, slots of a rank]. `work` is that of
    every slot.
    """
    num_chunks, size = _cut_into_chunks(len(slots), ring, ulysses, chunks_per_rank)
    chunks = slots.reshape(num_chunks, size)
    owner = np.asarray(_balance(work[chunks].sum(1), ring))
    return np.stack([chunks[owner == rank].reshape(ulysses, -1) for rank in range(ring)])


def _balance(work: IntArray, ring: int) -> tuple[int, ...]:
    """Greedy longest-processing-time assignment with equal chunk counts: the heaviest chunk goes to the
    idlest rank.
    """
    capacity = len(work) // ring
    owner = np.zeros(len(work), dtype=np.int64)
    load, count = [0] * ring, [0] * ring
    for chunk in sorted(range(len(work)), key=lambda c: (-int(work[c]), c)):
        rank = min((r for r in range(ring) if count[r] < capacity), key=lambda r: (load[r], r))
        owner[chunk] = rank
        load[rank] += int(work[chunk])
        count[rank] += 1
    return tuple(int(rank) for rank in owner)
