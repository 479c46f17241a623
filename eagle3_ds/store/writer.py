"""Writing a hidden-state store so that a crash loses at most the shard that is being written.

The store grows in the folder `<path>.partial`. A shard is written under a hidden name, synced to disk and
renamed, so a shard with its final name is complete; its header lists its pieces. The index is written last,
and then the folder is renamed to `path`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.store.fingerprint import Fingerprint, require_same
from eagle3_ds.store.index import (
    CHECKSUM,
    FLOAT8,
    IDENTITY,
    INDEX_FILE,
    PIECES,
    STORE_FORMAT,
    ColumnName,
    Piece,
    RowFormat,
    Shard,
    StoreIndex,
    covers,
    exponent_of,
    header_crc32,
)
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.rows import crc32, encode_float8, fitted, row_checksums

CAPTURED = "capture"
"""The `origin` of hidden states that this program computed."""
SHARD_BYTES = 2**30
OVERHEAD = 4096
"""An upper estimate of the bytes that a document takes in headers and index."""


def required_bytes(lengths: Mapping[int, int], layout: RowFormat) -> int:
    """Disk bytes that documents of these lengths (document_id -> tokens) take."""
    return sum(lengths.values()) * layout.row_bytes + len(lengths) * OVERHEAD


class HiddenStateWriter:
    """Writes the store at `path`. Documents may come in any order.

    An interrupted capture is continued: `missing()` lists the documents that are still to be written. Several
    processes may write at once, each with its own `rank`, either whole documents or those rows of each
    document that the rank holds. The writers of all ranks must be made before any of them writes. After all
    have called `flush()`, one of them calls `finish()`. The constructor writes nothing.

    Args:
        lengths: the documents of the store, {document id: tokens}.
        fingerprint: what the hidden states are computed from.
        shard_bytes: a shard is written once this many bytes wait in memory.
        origin: which program computed the hidden states.

    Attributes:
        required: bytes that the missing documents take.
        free: bytes free on the file system of `path`.

    Raises:
        ValueError: the disk is too small, there is a complete store already, or the interrupted capture is
            damaged or was made from something else.
    """

    def __init__(
        self,
        path: str | Path,
        lengths: Mapping[int, int],
        layout: RowFormat,
        fingerprint: Fingerprint,
        shard_bytes: int = SHARD_BYTES,
        rank: int = 0,
        origin: str = CAPTURED,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.lengths = dict(lengths)
        self.layout = layout
        self.fingerprint = dict(fingerprint)
        self.origin = origin
        text = f"{layout.aux_width} + {layout.teacher_width} {layout.dtype}"
        self._identity = {**fingerprint, "layout": text, "origin": origin}
        self.shard_bytes = shard_bytes
        self.rank = rank
        self._tensors: dict[str, Tensor] = {}
        self._pending: list[Piece] = []
        self._pending_bytes = 0
        if self.path.exists():
            raise ValueError(
                f"there is a complete hidden-state store at {self.path}: open it, or remove the folder first"
            )
        self._spans: dict[int, list[tuple[int, int]]] = {document: [] for document in self.lengths}
        for file in self._shard_files():
            for piece in self._read_pieces(file):
                self._spans[piece.document].append((piece.start, piece.stop))
        self.required = required_bytes(
            {document: self.lengths[document] for document in self.missing()}, layout
        )
        self.free = shutil.disk_usage(_existing(self.partial)).free
        if self.required > self.free:
            raise ValueError(
                f"the hidden states take {self.required:,} bytes and {_existing(self.partial)} has "
                f"{self.free:,} free: free some space, put data.cache_dir on another disk, set "
                "data.hidden_dtype to float8, or use fewer or shorter conversations "
                "(data.max_conversations, data.max_length)"
            )

    @property
    def size_text(self) -> str:
        """How much will be written and where, for people."""
        missing = self.missing()
        tokens = sum(self.lengths[document] for document in missing)
        done = (
            f", {len(self.lengths) - len(missing)} documents are there already"
            if self.partial.exists()
            else ""
        )
        return (
            f"{len(missing)} documents of {tokens:,} tokens take {_decimal(self.required)} as "
            f"{self.layout.dtype} in {self.path.parent}, {_decimal(self.free)} are free{done}"
        )

    def missing(self) -> list[int]:
        """The documents that `holds` denies, in the order of `lengths`."""
        return [document for document in self.lengths if not self.holds(document)]

    def holds(self, document_id: int) -> bool:
        """Whether every row of the document was on disk when this writer was made, or was appended since."""
        return covers(self._spans[document_id], self.lengths[document_id])

    def append(
        self, document_id: int, aux: Tensor, teacher: Tensor, teacher_token: Tensor, start: int | None = None
    ) -> None:
        """Add a document, or some rows of it. They are copied to the host, cast to the store's dtypes.

        Args:
            aux: [n, aux_width], the inputs of the captured layers, on any device.
            teacher: [n, teacher_width], the output of the final norm.
            teacher_token: integers [n], the target's argmax.
            start: the row of the document that the first of these is; None: they are the whole document.

        Raises:
            ValueError: a shape is wrong, a value is not finite in the store's dtype, or the disk is full.
        """
        length = self.lengths[document_id]
        assert not self.holds(document_id), f"document {document_id} is in the store already"
        rows = length if start is None else len(teacher_token)
        piece = Piece(document_id, start or 0, rows, 0)
        assert piece.stop <= length, f"rows up to {piece.stop} of document {document_id} with {length} tokens"
        tensors = self._encode(piece, {"aux": aux, "teacher": teacher, "teacher_token": teacher_token})
        self._tensors |= {piece.key(name): tensor for name, tensor in tensors.items()}
        self._pending.append(piece._replace(checksum_crc32=crc32(tensors[CHECKSUM])))
        self._spans[document_id].append((piece.start, piece.stop))
        self._pending_bytes += rows * self.layout.row_bytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pieces that wait in memory as one shard.

        Raises:
            ValueError: the disk is full.
        """
        if not self._pending:
            return
        self.partial.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(file.stem.split("-")[2]) for file in self._shard_files(self.rank)), default=-1)
        name = f"shard-{self.rank:04d}-{number:06d}.safetensors"
        aside = self.partial / f".{name}"
        metadata = {"pieces": json.dumps(self._pending), "identity": json.dumps(self._identity)}
        with self._full_disk_told(aside):
            save_file(self._tensors, aside, metadata=metadata)
            aside.chmod(0o644)  # safetensors makes it readable by its owner only, but users may share a cache
            _sync(aside)
        os.rename(aside, self.partial / name)
        _sync(self.partial)
        self._tensors, self._pending, self._pending_bytes = {}, [], 0

    def finish(self) -> HiddenStateStore:
        """Write the last shard and the index, rename the folder, and open the store.

        Raises:
            ValueError: rows are missing, or the disk is full.
        """
        self.flush()
        shards = [self._describe(file) for file in self._shard_files()]
        spans: dict[int, list[tuple[int, int]]] = {document: [] for document in self.lengths}
        for piece in (piece for shard in shards for piece in shard.pieces):
            spans[piece.document].append((piece.start, piece.stop))
        absent = [
            document for document, length in self.lengths.items() if not covers(spans[document], length)
        ]
        if absent:
            raise ValueError(
                f"the capture into {self.partial} has {len(self.lengths) - len(absent)} whole documents "
                f"instead of {len(self.lengths)}; missing: {absent[:5]}. Capture these, or remove the folder "
                "and start again"
            )
        for leftover in self.partial.glob(".shard-*"):
            leftover.unlink()
        aside = self.partial / f".{INDEX_FILE}"
        index = StoreIndex(
            format=STORE_FORMAT,
            origin=self.origin,
            layout=self.layout,
            fingerprint=self.fingerprint,
            shards=shards,
        )
        with self._full_disk_told(aside):
            aside.write_text(index.model_dump_json(indent=1) + "\n")
            _sync(aside)
        os.rename(aside, self.partial / INDEX_FILE)
        _sync(self.partial)
        os.rename(self.partial, self.path)
        _sync(self.path.parent)
        return HiddenStateStore.open(self.path, self.fingerprint)

    @contextlib.contextmanager
    def _full_disk_told(self, aside: Path) -> Iterator[None]:
        """Turn an error of writing `aside` into a ValueError with what to do, and remove the file."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise ValueError(
                f"{aside.with_name(aside.name.removeprefix('.'))} could not be written ({error}). The shards "
                "before it are whole: free some space and run again, the capture continues after them"
            ) from error

    def _encode(self, piece: Piece, given: Mapping[ColumnName, Tensor]) -> dict[str, Tensor]:
        """The tensors of a piece as they are stored, by name: copies on the CPU.

        Raises:
            ValueError: a shape is wrong, or a value is not finite in the store's dtype.
        """
        encoded: dict[str, Tensor] = {}
        for name, tensor in given.items():
            where = f"{name} of document {piece.document}"
            expected = (piece.length, *self.layout.width(name))
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {expected}")
            if name == "teacher_token":
                encoded[name] = tensor.detach().to("cpu", torch.int32, copy=True).contiguous()
            else:
                encoded |= self._encode_states(
                    name, tensor.detach(), f"{where} is not finite as {self.layout.dtype}", piece
                )
        ordered = {name: encoded[name] for name in self.layout.tensors(1) if name != CHECKSUM}
        return ordered | {
            CHECKSUM: torch.stack([row_checksums(tensor) for tensor in ordered.values()], dim=1)
        }

    def _encode_states(
        self, name: ColumnName, states: Tensor, not_finite: str, piece: Piece
    ) -> dict[str, Tensor]:
        stored, row = fitted(states, self.layout.dtype)
        if row is not None:
            largest = states[row].abs().max().item()
            raise ValueError(
                f"{not_finite} (largest input {largest:.4g}), first at row {row + piece.start}: set "
                "data.hidden_dtype to bfloat16 or float32, or mend the target. `eagle3-ds data inspect "
                f"RECIPE --document {piece.document}` shows its text"
            )
        if self.layout.dtype != FLOAT8:
            return {name: stored}
        codes, exponents = encode_float8(stored, self.layout.teacher_width)
        return {name: codes, exponent_of(name): exponents}

    def _shard_files(self, rank: int | None = None) -> list[Path]:
        return sorted(self.partial.glob(f"shard-{'*' if rank is None else f'{rank:04d}'}-*.safetensors"))

    def _read_pieces(self, file: Path) -> list[Piece]:
        """The pieces of a shard, from its header.

        Raises:
            ValueError: the shard is damaged, or was made from something else.
        """
        try:
            with safe_open(file, framework="pt") as shard:
                metadata = shard.metadata() or {}
            pieces = PIECES.validate_json(metadata.get("pieces", ""))
            identity = IDENTITY.validate_json(metadata.get("identity", ""))
        except (SafetensorError, ValidationError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): remove that file, the capture will make its rows again"
            ) from error
        again = f"finish what began it, or remove the folder {self.partial} to start again"
        require_same(identity, self._identity, str(file), again)
        strange = [piece for piece in pieces if piece.stop > self.lengths.get(piece.document, 0)]
        if strange:
            raise ValueError(
                f"{file} holds rows up to {strange[0].stop} of document {strange[0].document}, which has "
                f"{self.lengths.get(strange[0].document, 0)} tokens here: {again}"
            )
        return pieces

    def _describe(self, file: Path) -> Shard:
        return Shard(
            file=file.name,
            bytes=file.stat().st_size,
            header_crc32=header_crc32(file),
            pieces=self._read_pieces(file),
        )


def _decimal(size: int) -> str:
    """Bytes for people, in powers of 1000 like the sizes of disks: 1500 is "1.5 kB"."""
    if size < 1000:
        return f"{size} bytes"
    units = ("kB", "MB", "GB", "TB", "PB")
    power = min((len(str(size)) - 1) // 3, len(units))
    return f"{size / 1000**power:,.1f} {units[power - 1]}"


def _existing(path: Path) -> Path:
    """`path`, or its nearest parent, that exists and is a folder."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
