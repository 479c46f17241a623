"""Reading runs of elements from the files of a checkpoint, whichever way those who wrote it had cut them.

Of W ranks that resume from the files of W others, each reads the headers of its share of the files, all
exchange what they have found, and a rank then opens only the files that hold its own elements. If each looked
through all files, they would open W * W of them on the shared storage.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ds.checkpoint.format import KINDS, RANK_FILE, Fragment, Manifest


class Piece(NamedTuple):
    """Elements [start, start + numel) of one of `KINDS` of a flattened parameter: where they are.

    Attributes:
        kind, name: as in `KINDS`, and of the parameter.
        start, numel: in elements of the parameter.
        file: name of the file that holds them.
    """

    kind: str
    name: str
    start: int
    numel: int
    file: str

    @property
    def key(self) -> str:
        """The tensor's name in its file."""
        return Fragment(self.name, self.start, 0, self.numel).key(self.kind)


def pieces_in(folder: Path, files: Collection[str]) -> list[Piece]:
    """What the files of a checkpoint hold; those that ranks did not write are passed over. Headers alone are
    read.

    Raises:
        ValueError: a file is not safetensors, or not of a checkpoint.
    """
    return [piece for file in files if RANK_FILE.fullmatch(file) for piece in _pieces(folder, file)]


def _pieces(folder: Path, file: str) -> Iterable[Piece]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                if kind in KINDS:
                    (numel,) = opened.get_slice(key).get_shape()
                    yield Piece(kind, name, int(start), numel, file)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder / file} is not a file of a checkpoint: {error}") from error


def as_bytes(pieces: Sequence[Piece]) -> bytes:
    """To be sent to other ranks."""
    return json.dumps(pieces).encode()


def from_bytes(content: bytes) -> list[Piece]:
    """Of what `as_bytes` gave, with spaces behind it or without."""
    return [Piece(*piece) for piece in json.loads(content)]


class FragmentReader:
    """Reads any run of elements of a parameter's state. A context manager, which closes the opened files.

    Args:
        pieces: of all files that ranks wrote, in any order.

    Raises:
        ValueError: the pieces do not cover every parameter exactly once.
    """

    def __init__(self, folder: Path, manifest: Manifest, pieces: Iterable[Piece]) -> None:
        self._folder = folder
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        for piece in sorted(pieces):
            # One without elements would stand between two others that meet there.
            if piece.numel:
                self._pieces.setdefault((piece.kind, piece.name), []).append(piece)
        for parameter, shape in manifest.parameters.items():
            for kind in KINDS:
                self._check_cover(kind, parameter, math.prod(shape))
        self._opened: dict[str, Any] = {}
        self._files = ExitStack()

    def __enter__(self) -> FragmentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._opened.clear()

    def _check_cover(self, kind: str, parameter: str, numel: int) -> None:
        end = 0
        for piece in self._pieces.get((kind, parameter), []):
            if piece.start != end:
                raise ValueError(
                    f"{self._folder}: {kind} of {parameter} has a gap or an overlap at element "
                    f"{min(piece.start, end)}."
                )
            end += piece.numel
        if end != numel:
            raise ValueError(f"{self._folder}: {kind} of {parameter} has {end} elements instead of {numel}.")

    def read(self, kind: str, fragment: Fragment) -> Tensor:
        """The elements of a fragment, fp32 [fragment.numel] on the CPU, of one of `KINDS`."""
        out = torch.empty(fragment.numel)
        last = fragment.start + fragment.numel
        pieces = self._pieces.get((kind, fragment.name), [])
        first = bisect_right(pieces, fragment.start, key=lambda piece: piece.start) - 1
        for piece in pieces[max(0, first) :]:
            low, high = max(piece.start, fragment.start), min(piece.start + piece.numel, last)
            if low >= high:
                break
            stored = self._open(piece.file).get_slice(piece.key)
            out[low - fragment.start : high - fragment.start] = stored[low - piece.start : high - piece.start]
        return out

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            self._opened[file] = self._files.enter_context(safe_open(self._folder / file, framework="pt"))
        return self._opened[file]
