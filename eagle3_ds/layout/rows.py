"""Rows that stay where they are, on disk or in host memory, and are read a tile at a time.

The hidden states of a long sequence are gigabytes: a rank reads the rows of its own spans only, and a device
holds one tile of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


class Rows(Protocol):
    """Rows that can be read a slice at a time: a tensor, or a view of a store on disk."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class LocalRows:
    """This rank's rows of a packed sequence, on the host, unread until asked for.

    Args:
        rows: the rows of the whole sequence.
        slots: int64 [N]: which of them are this rank's. Slots >= `length` stand for padding, come last and
            read as zeros.
        length: real rows of the sequence.
    """

    def __init__(self, rows: Rows, slots: IntArray, length: int) -> None:
        self._rows, self._slots, self._length = rows, slots, length

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, rows: slice) -> Tensor:
        """Local rows [start, stop)."""
        return self._read(self._slots[rows])

    def take(self, indices: IntArray) -> Tensor:
        """The local rows of ascending `indices`."""
        return self._read(self._slots[indices])

    def _read(self, slots: IntArray) -> Tensor:
        """As few contiguous slices as there are spans."""
        inside = slots[slots < self._length]
        breaks = np.flatnonzero(np.diff(inside) != 1) + 1
        spans = [span for span in np.split(inside, breaks) if len(span)]
        parts = [self._rows[int(span[0]) : int(span[-1]) + 1] for span in spans] or [self._rows[0:0]]
        missing = len(slots) - len(inside)
        if missing:
            parts.append(parts[0].new_zeros((missing, *parts[0].shape[1:])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def stream_rows(
    rows: LocalRows, tiles: Iterable[IntArray], device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """The rows of each tile on `device` in `dtype`, one tile ahead: while one is used, the next is read and
    copied.

    On a CPU the rows are where they are needed already, and nothing is read ahead.
    """
    if device.type == "cpu":
        yield from (rows.take(tile).to(dtype) for tile in tiles)
        return

    def fetch(tile: IntArray) -> Tensor:
        # Pinned, or the copy would make the host wait for the device.
        return rows.take(tile).pin_memory()

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = None
        for tile in tiles:
            following = reader.submit(fetch, tile)
            if ahead is not None:
                yield ahead.result().to(device, non_blocking=True).to(dtype)
            ahead = following
        if ahead is not None:
            yield ahead.result().to(device, non_blocking=True).to(dtype)


def row_tiles(num_rows: int, size: int) -> list[IntArray]:
    """0 .. num_rows - 1 in runs of `size`."""
    return [np.arange(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
