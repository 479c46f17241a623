"""SpanPlan: how one packed sequence is cut over ring x ulysses.

The padded sequence is cut into equal chunks. Each ring rank gets the same number of chunks, chosen so that the attention
work is even; because the step-0 keys are gathered (or streamed) as a whole, any chunk-to-rank map is legal. Within a ring
rank, the chunks in sequence order form its *columns*, and its Ulysses peers take equal contiguous parts of the columns.

Everything here is a pure function of (document lengths, ring, ulysses, chunks per rank), so every rank's view can be
computed, and tested, in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Run(NamedTuple):
    """A maximal stretch of one ring rank's columns that is contiguous in the sequence and lies in one document.

    `column` is the first column, `slot` the first slot, `length` the number of both, `document_start` the first slot of
    the document.
    """

    column: int
    slot: int
    length: int
    document_start: int


def attention_work(position: IntArray, in_document: NDArray[np.bool_]) -> IntArray:
    """Keys that the step-0 attention of each slot reads: position in its document + 1, and none for padding. Shape [L]."""
    return np.where(in_document, position + 1, 0)


def cut_into_chunks(length: int, ring: int, ulysses: int, chunks_per_rank: int) -> tuple[int, int]:
    """Chunks of a sequence of `length` tokens, and slots of each; their product is the padded length."""
    # One ring rank has nothing to balance. Chunks shorter than `ulysses` slots cannot be shared by its peers.
    num_chunks = ring * (1 if ring == 1 else chunks_per_rank)
    return num_chunks, _round_up(-(-length // num_chunks), ulysses)


@dataclass(frozen=True)
class SpanPlan:
    """The cut of one packed sequence. Build it with `SpanPlan.make`.

    Attributes:
        lengths: document lengths in tokens, in the order of the pack; their sum is `length`.
        padded_length: `length` rounded up so that every sp rank holds the same number of slots.
        chunk_size: slots per chunk, a multiple of `ulysses`.
        owner: ring rank of each chunk, shape [padded_length / chunk_size].
    """

    lengths: tuple[int, ...]
    ring: int
    ulysses: int
    padded_length: int
    chunk_size: int
    owner: tuple[int, ...]

    @staticmethod
    def make(lengths: Sequence[int], ring: int = 1, ulysses: int = 1, chunks_per_rank: int = 8) -> SpanPlan:
        """Plan the cut.

        Raises:
            ValueError: no document, a document without a token, or a degree below one.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths = {list(lengths)[:8]}: a packed sequence needs documents of one token or more.")
        if min(ring, ulysses, chunks_per_rank) < 1:
            raise ValueError(f"ring = {ring}, ulysses = {ulysses}, chunks_per_rank = {chunks_per_rank}: each must be >= 1.")
        num_chunks, chunk_size = cut_into_chunks(sum(lengths), ring, ulysses, chunks_per_rank)
        padded_length = num_chunks * chunk_size
        work = attention_work(*_positions(lengths, padded_length)).reshape(num_chunks, chunk_size).sum(1)
        return SpanPlan(tuple(lengths), ring, ulysses, padded_length, chunk_size, _balance(work, ring))

    @property
    def length(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    @property
    def columns_per_ring_rank(self) -> int:
        return self.padded_length // self.ring

    @property
    def slots_per_rank(self) -> int:
        """Slots that each sp rank holds, the same for all."""
        return self.padded_length // (self.ring * self.ulysses)

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
        """Slot of each column of each ring rank, shape [ring, columns_per_ring_rank], ascending within a rank."""
        owner = np.asarray(self.owner)
        chunks = np.stack([np.flatnonzero(owner == rank) for rank in range(self.ring)])
        slots = chunks[:, :, None] * self.chunk_size + np.arange(self.chunk_size)
        return slots.reshape(self.ring, -1)

    @cached_property
    def sequence_order(self) -> IntArray:
        """Row of each slot in the rank-by-rank concatenation of all ring ranks' columns. Shape [padded_length]."""
        order = np.empty(self.padded_length, dtype=np.int64)
        order[self.ring_slots.reshape(-1)] = np.arange(self.padded_length)
        return order

    def slots(self, ring_rank: int, ulysses_rank: int) -> IntArray:
        """Slots that this sp rank holds, in the order of its columns. Shape [slots_per_rank]."""
        size = self.slots_per_rank
        return self.ring_slots[ring_rank, ulysses_rank * size : (ulysses_rank + 1) * size]

    def runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The ring rank's columns as runs, padding left out, in sequence order."""
        slots = self.ring_slots[ring_rank]
        document = self.document[slots]
        breaks = (np.diff(slots) != 1) | (np.diff(document) != 0)
        starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        stops = np.concatenate((starts[1:], [len(slots)]))
        return tuple(
            Run(int(a), int(slots[a]), int(b - a), int(slots[a] - self.position[slots[a]]))
            for a, b in zip(starts, stops, strict=True)
            if document[a] >= 0
        )

    def halo_slots(self, ring_rank: int, ulysses_rank: int, halo: int) -> IntArray:
        """Slots whose constants this sp rank reads: each span [s, e) widened to [s, e + halo), overlaps merged, ascending.

        Slots at or beyond `padded_length` stand for nothing and are treated as padding by the cutter.
        """
        slots = self.slots(ring_rank, ulysses_rank)
        return np.unique(slots[:, None] + np.arange(halo + 1)) if halo else slots

    def ring_work(self) -> IntArray:
        """Step-0 attention work (query-key pairs) of each ring rank. Shape [ring]."""
        work = attention_work(self.position, self.document >= 0)
        return work[self.ring_slots].sum(1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _positions(lengths: Sequence[int], padded_length: int) -> tuple[IntArray, NDArray[np.bool_]]:
    sizes = np.asarray(lengths, dtype=np.int64)
    total = int(sizes.sum())
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.zeros(padded_length, dtype=np.int64)
    position[:total] = np.arange(total) - starts
    return position, np.arange(padded_length) < total


def _balance(work: IntArray, ring: int) -> tuple[int, ...]:
    """Greedy longest-processing-time assignment with equal chunk counts: the heaviest chunk goes to the idlest rank."""
    capacity = len(work) // ring
    owner = np.zeros(len(work), dtype=np.int64)
    load, count = [0] * ring, [0] * ring
    for chunk in sorted(range(len(work)), key=lambda c: (-int(work[c]), c)):
        rank = min((r for r in range(ring) if count[r] < capacity), key=lambda r: (load[r], r))
        owner[chunk] = rank
        load[rank] += int(work[chunk])
        count[rank] += 1
    return tuple(int(rank) for rank in owner)
