"""Rows that stay on disk or in host memory and are read a tile (some rows) at a time.

The hidden states of a long sequence are gigabytes. A rank reads only the rows of its own spans, and a device
holds one tile of them, plus the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.device.kinds import CPU
from eagle3_ds.device.runtime import current_stream, new_stream, on_stream, pinned

IntArray = NDArray[np.int64]

READERS = 3
"""Threads that read tiles: one of them reads slower than a device copies."""
PLACES = 2
"""Tiles that a device holds: one that is computed with, and one that is copied."""


class Rows(Protocol):
    """Rows that can be read a slice at a time: a tensor, or a view of a store on disk."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@runtime_checkable
class CodedRows(Rows, Protocol):
    """Rows that lie in fewer bytes than they have. So they go to a device, which decodes them."""

    def coded(self, rows: slice, /) -> Tensor:
        """What lies there, uint8 [n, bytes of a row]. A row of zero bytes is a row of zeros."""
        ...

    def decoded(self, codes: Tensor, /) -> Tensor:
        """The rows of `coded`, on the device of `codes`."""
        ...


class LocalRows:
    """This rank's rows of a packed sequence, on the host. A row is read when it is indexed.

    Args:
        rows: the rows of the whole sequence.
        slots: int64 [N], which of them are this rank's. Slots >= `length` are padding: they come last and
            are read as zeros.
        length: how many rows the sequence has.
    """

    def __init__(self, rows: Rows, slots: IntArray, length: int) -> None:
        self._rows, self._slots, self._length = rows, slots, length
        self._lying = rows.coded if isinstance(rows, CodedRows) else rows.__getitem__

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, rows: slice) -> Tensor:
        """The local rows of a slice, [n, ...]."""
        return self.decoded(self._read(self._slots[rows]))

    def take(self, indices: IntArray) -> Tensor:
        """The local rows of `indices`, int64 [n], ascending -> [n, ...]."""
        return self.decoded(self.take_coded(indices))

    def take_coded(self, indices: IntArray) -> Tensor:
        """The local rows of `indices` as they lie: what `decoded` makes them of, [n, ...]."""
        return self._read(self._slots[indices])

    def decoded(self, rows: Tensor) -> Tensor:
        """The rows of `take_coded`, wherever they have been copied."""
        return self._rows.decoded(rows) if isinstance(self._rows, CodedRows) else rows

    def _read(self, slots: IntArray) -> Tensor:
        """Read one contiguous slice per span of consecutive slots, because a store on disk is fastest so."""
        inside = slots[slots < self._length]
        breaks = np.flatnonzero(np.diff(inside) != 1) + 1
        spans = [span for span in np.split(inside, breaks) if len(span)]
        parts = [self._lying(slice(int(span[0]), int(span[-1]) + 1)) for span in spans]
        parts = parts or [self._lying(slice(0, 0))]
        missing = len(slots) - len(inside)
        if missing:
            parts.append(parts[0].new_zeros((missing, *parts[0].shape[1:])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def stream_rows(
    rows: LocalRows, tiles: Sequence[IntArray], device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the rows of each tile on `device` in `dtype`; a tile is there until the next one is asked for.

    While the device computes with one tile, the next is copied on a stream of its own, and `READERS` threads
    read those behind it. On a CPU nothing is read ahead. Coded rows are decoded on the device.

    Args:
        rows: this rank's rows.
        tiles: int64 indices of local rows, ascending within a tile.
        device, dtype: of the result.
    """
    if device.type == CPU:
        yield from (rows.take(tile).to(dtype) for tile in tiles)
        return
    computing, copying = current_stream(device), new_stream(device)
    memory: list[Tensor] = []
    read: list[Any] = []
    for number, host in enumerate(_read_ahead(rows, tiles)):
        place = number % PLACES
        if number == place:
            sizes = (max(map(len, tiles)), *host.shape[1:])
            memory.append(torch.empty(sizes, dtype=host.dtype, device=device))
            # It may have been another tensor's, which the device still reads.
            read.append(computing.record_event())
        tile = memory[place][: len(host)]
        with on_stream(device, copying):
            copying.wait_event(read[place])
            tile.copy_(host, non_blocking=True)
        computing.wait_event(copying.record_event())
        yield rows.decoded(tile).to(dtype)
        read[place] = computing.record_event()


def _read_ahead(rows: LocalRows, tiles: Sequence[IntArray]) -> Iterator[Tensor]:
    """The rows of each tile as they lie, pinned, since a copy from other memory would make the host wait for
    the device.
    """

    def read(tile: IntArray) -> Tensor:
        return pinned(rows.take_coded(tile))

    with ThreadPoolExecutor(READERS) as readers:
        reading: deque[Future[Tensor]] = deque()
        for tile in tiles:
            reading.append(readers.submit(read, tile))
            if len(reading) > READERS:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def row_tiles(num_rows: int, size: int) -> list[IntArray]:
    """The indices 0 .. num_rows - 1, cut into tiles of `size` rows."""
    return [np.arange(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
