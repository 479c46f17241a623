"""Reading the target's hidden states from a store, row by row.

A store is a folder with `index.json` and safetensors shards. A document of L tokens has three columns:
    aux            [L, aux_width]       inputs of the captured target layers, concatenated
    teacher        [L, teacher_width]   output of the target's final norm
    teacher_token  int32 [L]            argmax of the target's logits over its full vocabulary
It is stored as one or more pieces, each a run of its rows in one shard. Where an interrupted capture was
continued on another mesh, pieces may overlap; both then hold the same rows. The format is in `index.py`.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ds.layout import Rows
from eagle3_ds.store.fingerprint import Fingerprint, require_same
from eagle3_ds.store.index import (
    CHECKSUM,
    FLOAT8,
    ColumnName,
    Piece,
    RowFormat,
    Shard,
    StoreIndex,
    exponent_of,
    pieces_by_document,
    read_index,
    shard_header,
)
from eagle3_ds.store.rows import ROWS_AT_ONCE, crc32, decode_float8, row_checksums

OPEN_SHARDS = 64
"""How many shards are mapped at a time; the usual limit of open files is 1024."""
NAMED_DAMAGES = 20
"""How many damaged tensors, or damaged rows of one, an error message lists."""


@dataclass(frozen=True)
class _Run:
    """Rows [start, stop) of a document, which are read from this piece."""

    start: int
    stop: int
    piece: Piece
    shard: Shard


class HiddenStateStore:
    """A complete store, opened for reading. Each rank opens it for itself and reads only the rows that it
    needs; nothing is collective.

    Attributes:
        lengths: {document id: tokens}.
        origin: which program computed the hidden states.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.layout: RowFormat = index.layout
        self.fingerprint: Fingerprint = index.fingerprint
        self.origin = index.origin
        self.shards = {shard.file: shard for shard in index.shards}
        self._runs = {
            document: _runs(pieces) for document, pieces in pieces_by_document(index.shards).items()
        }
        self.lengths = {document: runs[-1].stop for document, runs in self._runs.items()}
        self._opened: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, expect: Fingerprint | None = None) -> HiddenStateStore:
        """Open the store at `path`. The size of every shard is checked here, because reading past the end of
        a mapped file kills the process.

        Args:
            expect: the fingerprint that the store must have; None accepts any.

        Raises:
            ValueError: there is no store, its index is damaged, a shard is missing or has another size, or
                the fingerprint differs.
        """
        path = Path(path)
        index = read_index(path)
        if expect is not None:
            fix = f"capture again (remove the folder {path}), or set the recipe back to what the store holds"
            require_same(index.fingerprint, expect, str(path), fix)
        for shard in index.shards:
            _check_file(path / shard.file, shard.bytes)
        return cls(path, index)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards.values())

    def rows(self, document_id: int, name: ColumnName, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of one column of a document, and no others, from the disk.

        Returns:
            [stop - start, width] in `layout.read_dtype`, or int32 [stop - start] for teacher_token.

        Raises:
            ValueError: the store lacks the document, or a file is damaged.
        """
        return self.decoded(self.rows_as_stored(document_id, name, start, stop), name)

    def decoded(self, stored: Tensor, name: ColumnName) -> Tensor:
        """The rows of what `rows_as_stored` gave, on any device."""
        if not self.is_coded(name):
            return stored
        (width,) = self.layout.width(name)
        codes, exponents = stored.split([width, stored.shape[1] - width], 1)
        return decode_float8(codes.view(torch.float8_e4m3fn), exponents.view(torch.int8))

    def is_coded(self, name: ColumnName) -> bool:
        """Whether rows of this column are stored in float8."""
        return self.layout.dtype == FLOAT8 and name != "teacher_token"

    def rows_as_stored(self, document_id: int, name: ColumnName, start: int, stop: int) -> Tensor:
        """As `rows`, but of float8 the codes and then the exponents of rows, uint8 [stop - start, W + G]."""
        if document_id not in self._runs:
            raise ValueError(
                f"document {document_id} is not in the hidden-state store {self.path}: capture again"
            )
        length = self.lengths[document_id]
        assert 0 <= start <= stop <= length, (
            f"rows {start}:{stop} of document {document_id} with {length} tokens"
        )
        parts = [
            self._read(run, name, max(start, run.start), min(stop, run.stop))
            for run in self._runs[document_id]
            if run.start < stop and start < run.stop
        ]
        return self._join(parts, name)

    def view(self, documents: Sequence[int], name: ColumnName) -> PackedRows:
        """One column of several documents laid end to end; rows are read when they are sliced."""
        return (CodedPackedRows if self.is_coded(name) else PackedRows)(self, documents, name)

    def states(
        self, documents: Sequence[int], token_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Rows, Rows]:
        """The target's part of a `PackedSequence` of these documents, laid end to end: `teacher_token` int64
        [L], whole; `aux` and `teacher` as rows [L, width] that are read when they are sliced. The other
        arguments are for `OnlineStates`, which has the same method.

        Raises:
            ValueError: a file is damaged.
        """
        return (
            self.view(documents, "teacher_token")[:].long(),
            self.view(documents, "aux"),
            self.view(documents, "teacher"),
        )

    def close(self) -> None:
        """Nothing is running that must end."""

    def announce(self, packs: Iterator[Sequence[tuple[int, Sequence[int]]]]) -> None:
        """Nothing is fetched ahead."""

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Check that the store has every document of `lengths` ({document id: tokens}), and with that many
        tokens.

        Raises:
            ValueError: a document is missing or has another length.
        """
        wrong = [document for document, length in lengths.items() if self.lengths.get(document) != length]
        if wrong:
            raise ValueError(
                f"the hidden-state store {self.path} does not belong to these documents: {len(wrong)} of "
                f"{len(lengths)} are missing or have another length, the first is document {wrong[0]} with "
                f"{lengths[wrong[0]]} tokens (store: {self.lengths.get(wrong[0], 'absent')}). Capture again"
            )

    def verify(self, progress: Iterable[Shard] | None = None) -> None:
        """Recompute all checksums, which together cover every byte of every shard.

        Args:
            progress: the shards, wrapped by a progress bar; None checks `shards.values()`.

        Raises:
            ValueError: something is damaged. The message lists files, tensors and rows.
        """
        damages = [damage for shard in progress or self.shards.values() for damage in self._damages(shard)]
        if damages:
            more = f"; and {len(damages) - NAMED_DAMAGES} more" if len(damages) > NAMED_DAMAGES else ""
            raise ValueError(
                f"the hidden-state store {self.path} is damaged: {'; '.join(damages[:NAMED_DAMAGES])}{more}. "
                "Remove the folder and capture again"
            )

    def _damages(self, shard: Shard) -> Iterator[str]:
        """Yield a description of each damaged tensor of a shard."""
        try:
            self._open_shard(shard)
        except ValueError as error:
            yield str(error)
            return
        for piece in shard.pieces:
            place = f"{shard.file}, {{}} of document {piece.document}"
            checksums = self._slice(shard, piece, CHECKSUM)[:]
            if crc32(checksums) != piece.checksum_crc32:
                yield f"{place.format(CHECKSUM)}, rows {piece.start}:{piece.stop}"
                continue
            for column, name in enumerate(list(self.layout.tensors(1))[:-1]):
                rows = _damaged_rows(self._slice(shard, piece, name), checksums[:, column])
                if rows:
                    yield f"{place.format(name)}, {_say_rows(rows, piece.start)}"

    def _read(self, run: _Run, name: ColumnName, start: int, stop: int) -> Tensor:
        first, last = start - run.piece.start, stop - run.piece.start
        rows: Tensor = self._slice(run.shard, run.piece, name)[first:last]
        if not self.is_coded(name):
            return rows
        exponents = self._slice(run.shard, run.piece, exponent_of(name))[first:last]
        # Side by side in one tensor, so that they are joined and copied as rows of any other kind.
        return torch.cat([rows.view(torch.uint8), exponents.view(torch.uint8)], 1)

    def _slice(self, shard: Shard, piece: Piece, name: str) -> Any:
        """A stored tensor of a piece; its rows are read when they are sliced.

        Raises:
            ValueError: it is missing, or its shape or dtype is not that of the index.
        """
        key = piece.key(name)
        wanted = self.layout.tensors(piece.length)[name]
        try:
            stored = self._open_shard(shard).get_slice(key)
        except SafetensorError as error:
            raise self._damaged(shard, f"{key}: {error}") from error
        found = tuple(stored.get_shape())
        if found != wanted.shape or stored[0:1].dtype != wanted.dtype:
            raise self._damaged(
                shard, f"{key} is {stored.get_dtype()} {found} instead of {wanted.dtype} {wanted.shape}"
            )
        return stored

    def _open_shard(self, shard: Shard) -> Any:
        """The mapped shard.

        Raises:
            ValueError: the file has gone, has another size, or a damaged header.
        """
        if shard.file in self._opened:
            self._opened.move_to_end(shard.file)
            return self._opened[shard.file]
        path = self.path / shard.file
        _check_file(path, shard.bytes)
        if zlib.crc32(shard_header(path)) != shard.header_crc32:
            raise self._damaged(shard, "its header is not the one that was written")
        try:
            self._opened[shard.file] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise self._damaged(shard, f"header unreadable: {error}") from error
        if len(self._opened) > OPEN_SHARDS:
            self._opened.popitem(last=False)
        return self._opened[shard.file]

    def _damaged(self, shard: Shard, what: str) -> ValueError:
        return ValueError(
            f"{self.path / shard.file} is damaged ({what}): remove the folder {self.path} and capture again"
        )

    def _join(self, parts: Sequence[Tensor], name: ColumnName) -> Tensor:
        if not parts:
            return self.no_rows(name)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def no_rows(self, name: ColumnName) -> Tensor:
        """What `rows_as_stored` gives of no rows."""
        if self.is_coded(name):
            (width,) = self.layout.width(name)
            return torch.empty((0, width + width // self.layout.teacher_width), dtype=torch.uint8)
        dtype = torch.int32 if name == "teacher_token" else self.layout.read_dtype
        return torch.empty((0, *self.layout.width(name)), dtype=dtype)


def _runs(pieces: Sequence[tuple[Piece, Shard]]) -> tuple[_Run, ...]:
    """Choose from which piece each row of a document is read: runs in order, without overlap. The pieces of a
    checked index leave no gap.
    """
    runs: list[_Run] = []
    reached, last = 0, max(piece.stop for piece, _ in pieces)
    while reached < last:
        piece, shard = max(
            (entry for entry in pieces if entry[0].start <= reached), key=lambda entry: entry[0].stop
        )
        runs.append(_Run(reached, piece.stop, piece, shard))
        reached = piece.stop
    return tuple(runs)


def _check_file(path: Path, expected: int) -> None:
    fix = f"remove the folder {path.parent} and capture again"
    if path.resolve().parent != path.parent.resolve():
        raise ValueError(
            f"{path} is a link out of the hidden-state store, to {path.resolve()}, and is not followed: {fix}"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing from the hidden-state store: {fix}")
    size = path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes instead of {expected}, it is truncated or overwritten: {fix}"
        )


def _damaged_rows(piece: Any, checksums: Tensor) -> list[int]:
    """The rows of a stored tensor whose checksums differ. `ROWS_AT_ONCE` rows are read at a time."""
    damaged: list[int] = []
    for start in range(0, len(checksums), ROWS_AT_ONCE):
        expected = checksums[start : start + ROWS_AT_ONCE]
        wrong = row_checksums(piece[start : start + len(expected)]) != expected
        damaged += (wrong.nonzero().flatten() + start).tolist()
    return damaged


def _say_rows(rows: Sequence[int], offset: int) -> str:
    shown = ", ".join(str(row + offset) for row in rows[:NAMED_DAMAGES])
    more = f" and {len(rows) - NAMED_DAMAGES} more" if len(rows) > NAMED_DAMAGES else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"


class PackedRows:
    """One column of several documents laid end to end, [L, width] or [L]. `rows[a:b]` reads rows [a, b) and
    no others, from as many documents as they span.
    """

    def __init__(self, store: HiddenStateStore, documents: Sequence[int], name: ColumnName) -> None:
        self.store = store
        self.documents = tuple(documents)
        self.name = name
        length = sum(store.lengths[document] for document in documents)
        self.shape = (length, *store.layout.width(name))
        self.dtype = torch.int32 if name == "teacher_token" else store.layout.read_dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.store.decoded(self._as_stored(rows), self.name)

    def _as_stored(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows of a hidden-state store are read in order, not in steps of {step}")
        parts = []
        offset = 0
        for document in self.documents:
            length = self.store.lengths[document]
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                parts.append(self.store.rows_as_stored(document, self.name, first, last))
            offset += length
        if not parts:
            return self.store.no_rows(self.name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class CodedPackedRows(PackedRows):
    """Of a column in float8: its bytes can be had as they are stored, and be decoded elsewhere
    (`eagle3_ds.layout.CodedRows`).
    """

    def coded(self, rows: slice) -> Tensor:
        """uint8 [n, W + G]: the codes and then the exponents of each row."""
        return self._as_stored(rows)

    def decoded(self, codes: Tensor) -> Tensor:
        """Rows [n, W] bfloat16 of `coded`, on its device."""
        return self.store.decoded(codes, self.name)
