"""What one rank of a large world does on the shared storage to go on from a checkpoint; part of
`python -m benchmarks.large_world`.

Each rank of ZeRO stage 3 has written a piece of every parameter, of masters and both moments. Here the
parameters are small; files, headers and pieces are as many as there. The product's own functions read them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from eagle3_ds.checkpoint import fragments
from eagle3_ds.checkpoint.format import KINDS, Fragment, Manifest, file_entry, rank_file
from eagle3_ds.checkpoint.fragments import FragmentReader, as_bytes, from_bytes, pieces_in
from eagle3_ds.launch.logs import seconds_between_looks

PARAMETERS = tuple(f"parameter.{number}" for number in range(15))
"""As many as an EAGLE-3 draft of one layer trains."""
ELEMENTS = 8_192
"""Of each, so that every rank of 4,096 has some."""


@dataclass
class Resume:
    """Figures of the rank that took longest, of those that were looked at.

    Attributes:
        opened: files that the rank opened: to learn what its share of them holds, and to read its own pieces.
        exchanged_bytes: what all ranks tell each other of the files, which each of them receives.
        seconds: from the first file opened to the last element read, the exchange itself not included.
        orders_a_second: how often all supervisors together open the control file.
        faults: elements that are not those that were written.
    """

    opened: int
    exchanged_bytes: int
    seconds: float
    orders_a_second: float
    faults: list[str]


def resume_world(world_size: int, ranks: Sequence[int]) -> Resume:
    """Write the files of a world, and read the shares of `ranks` as ranks of an equal world do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = _write(folder, world_size)
        files = sorted(manifest.files)
        told = [as_bytes(pieces_in(folder, [file])) for file in files]
        longest = max(map(len, told))
        rows = [row.ljust(longest) for row in told]
        opened, seconds, faults = 0, 0.0, []
        for rank in ranks:
            with _counted() as names:
                started = time.perf_counter()
                pieces_in(folder, files[rank::world_size])
                pieces = [piece for row in rows for piece in from_bytes(row)]
                with FragmentReader(folder, manifest, pieces) as reader:
                    read = {
                        kind: [reader.read(kind, own) for own in _own(rank, world_size)] for kind in KINDS
                    }
                seconds = max(seconds, time.perf_counter() - started)
            opened = max(opened, len(names))
            faults += _wrong(rank, world_size, read)
    looks = world_size / seconds_between_looks(world_size)
    return Resume(opened, longest * world_size, round(seconds, 6), round(looks, 1), faults)


def _own(rank: int, world_size: int) -> list[Fragment]:
    return [Fragment(name, 0, 0, ELEMENTS).share(rank, world_size) for name in PARAMETERS]


def _values(kind: str, fragment: Fragment) -> torch.Tensor:
    """fp32 [fragment.numel], another number for each element of each parameter and kind: exact in fp32."""
    first = (KINDS.index(kind) * len(PARAMETERS) + PARAMETERS.index(fragment.name)) * ELEMENTS
    return torch.arange(first + fragment.start, first + fragment.start + fragment.numel).float()


def _write(folder: Path, world_size: int) -> Manifest:
    for rank in range(world_size):
        own = _own(rank, world_size)
        save_file(
            {part.key(kind): _values(kind, part) for kind in KINDS for part in own}, folder / rank_file(rank)
        )
    names = [rank_file(rank) for rank in range(world_size)]
    return Manifest(
        step=1,
        packs=1,
        adam_steps=1,
        skipped_steps=0,
        heldout_loss=None,
        recipe={},
        mesh={},
        parameters=dict.fromkeys(PARAMETERS, (ELEMENTS,)),
        versions={},
        files={name: file_entry(folder / name) for name in names},
    )


@contextmanager
def _counted() -> Iterator[list[str]]:
    """The names of the files that the block opens to read fragments."""
    names: list[str] = []
    whole = fragments.safe_open

    def opened(path: Path, **settings: Any) -> Any:
        names.append(path.name)
        return whole(path, **settings)

    with mock.patch.object(fragments, "safe_open", opened):
        yield names


def _wrong(rank: int, world_size: int, read: dict[str, list[torch.Tensor]]) -> list[str]:
    return [
        f"rank {rank} has read other elements of {kind} of {own.name} than were written"
        for kind, parts in read.items()
        for own, part in zip(_own(rank, world_size), parts, strict=True)
        if not torch.equal(part, _values(kind, own))
    ]
