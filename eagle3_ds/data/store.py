"""Hidden states of the target on disk, read row by row.

A store is a folder with `index.json` and safetensors shards. Document d of length L is three tensors of one shard:
    aux.d           [L, aux_width]       inputs of the auxiliary target layers, concatenated
    teacher.d       [L, teacher_width]   last hidden state after the target's final norm
    teacher_token.d int32 [L]            argmax of the target's logits over its full vocabulary
`store_writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ds.data.fingerprint import Fingerprint, require_same

INDEX_FILE = "index.json"
STORE_FORMAT = 1
OPEN_SHARDS = 64
"""Shards kept mapped at a time, far below the usual limit of open files."""
TensorName = Literal["aux", "teacher", "teacher_token"]
TENSOR_NAMES: tuple[TensorName, ...] = ("aux", "teacher", "teacher_token")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """Widths and dtype that all documents of a store share."""

    aux_width: int
    teacher_width: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one token: both hidden states and an int32."""
        return (self.aux_width + self.teacher_width) * DTYPES[self.dtype].itemsize + 4

    def shape(self, name: TensorName, length: int) -> tuple[int, ...]:
        return {
            "aux": (length, self.aux_width),
            "teacher": (length, self.teacher_width),
            "teacher_token": (length,),
        }[name]

    def torch_dtype(self, name: TensorName) -> torch.dtype:
        return torch.int32 if name == "teacher_token" else DTYPES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file: its size, checksum, and `[document_id, length, {tensor name: crc32}]` of each document in it."""

    file: str
    bytes: int
    sha256: str
    documents: list[tuple[int, int, dict[str, int]]]


def tensor_crc32(tensor: Tensor) -> int:
    """Checksum of the tensor's bytes, to name the damaged one when a shard's checksum fails."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


class HiddenStateStore:
    """A complete store, opened for reading. `lengths` is {document_id: tokens}."""

    def __init__(self, path: Path, layout: Layout, fingerprint: Fingerprint, shards: Sequence[Shard]) -> None:
        self.path = path
        self.layout = layout
        self.fingerprint = fingerprint
        self.shards = {shard.file: shard for shard in shards}
        self.lengths = {document: length for shard in shards for document, length, _ in shard.documents}
        self._shard_of = {document: shard.file for shard in shards for document, _, _ in shard.documents}
        self._opened: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, expect: Fingerprint | None = None) -> HiddenStateStore:
        """Open the store at `path`; every shard must be there in full size, and the fingerprint must equal `expect`.

        A short file must be found here: reading past the end of a mapped file kills the process. Raises ValueError.
        """
        path = Path(path)
        index_file = path / INDEX_FILE
        if not index_file.is_file():
            raise ValueError(
                f"no hidden-state store at {path}: {INDEX_FILE} is missing. Capture the hidden states (an interrupted "
                "capture continues where it stopped)"
            )
        try:
            index = json.loads(index_file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{index_file} is damaged ({error}): remove the folder {path} and capture again") from error
        if index.get("format") != STORE_FORMAT:
            raise ValueError(
                f"{index_file} has format {index.get('format')!r}, this version reads {STORE_FORMAT}: remove the "
                "folder "
                f"{path} and capture again"
            )
        if expect is not None:
            fix = f"capture again (remove the folder {path}), or set the recipe back to what the store holds"
            require_same(index["fingerprint"], expect, str(path), fix)
        shards = [Shard(**shard) for shard in index["shards"]]
        for shard in shards:
            _check_size(path / shard.file, shard.bytes)
        return cls(path, Layout(**index["layout"]), index["fingerprint"], shards)

    def rows(self, document_id: int, name: TensorName, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one tensor of one document; only these are read from the disk."""
        if document_id not in self._shard_of:
            raise ValueError(f"document {document_id} is not in the hidden-state store {self.path}: capture again")
        length = self.lengths[document_id]
        assert 0 <= start <= stop <= length, f"rows {start}:{stop} of document {document_id} with {length} tokens"
        piece = self._open_shard(self._shard_of[document_id]).get_slice(f"{name}.{document_id}")
        return piece[start:stop]

    def view(self, documents: Sequence[int], name: TensorName) -> PackedRows:
        """The rows of several documents end to end, read only when sliced."""
        return PackedRows(self, documents, name)

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Raises ValueError unless the store holds every document of `lengths` with that many tokens."""
        wrong = [document for document, length in lengths.items() if self.lengths.get(document) != length]
        if wrong:
            raise ValueError(
                f"the hidden-state store {self.path} does not belong to these documents: {len(wrong)} of "
                f"{len(lengths)} "
                f"are missing or have another length, the first is document {wrong[0]} with {lengths[wrong[0]]} tokens "
                f"(store: {self.lengths.get(wrong[0], 'absent')}). Capture again"
            )

    def verify(self) -> None:
        """Recompute every checksum. Raises ValueError that names the damaged file and the tensors in it."""
        for shard in self.shards.values():
            path = self.path / shard.file
            _check_size(path, shard.bytes)
            if file_sha256(path) != shard.sha256:
                raise ValueError(
                    f"{path} is damaged ({_damage(path, shard)}): its sha256 is not the one in {INDEX_FILE}. Remove "
                    "the "
                    f"folder {self.path} and capture again"
                )

    def _open_shard(self, file: str) -> Any:
        if file in self._opened:
            self._opened.move_to_end(file)
        else:
            self._opened[file] = safe_open(self.path / file, framework="pt")
            if len(self._opened) > OPEN_SHARDS:
                self._opened.popitem(last=False)
        return self._opened[file]


def _check_size(path: Path, expected: int) -> None:
    fix = f"remove the folder {path.parent} and capture again"
    if not path.is_file():
        raise ValueError(f"{path} is missing from the hidden-state store: {fix}")
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes instead of {expected}, it is truncated or overwritten: {fix}")


def _damage(path: Path, shard: Shard) -> str:
    """Which tensors of a damaged shard differ, in words."""
    try:
        opened = safe_open(path, framework="pt")
        wrong = [
            f"{name}.{document} rows 0:{length}"
            for document, length, checksums in shard.documents
            for name, checksum in checksums.items()
            if tensor_crc32(opened.get_tensor(f"{name}.{document}")) != checksum
        ]
    except SafetensorError as error:
        return f"header unreadable: {error}"
    return ", ".join(wrong) or "header or padding, no tensor"


class PackedRows:
    """The rows of several documents end to end, [L, width] or [L]; `rows[a:b]` reads just rows a to b, across
    documents.
    """

    def __init__(self, store: HiddenStateStore, documents: Sequence[int], name: TensorName) -> None:
        self.store = store
        self.documents = tuple(documents)
        self.name = name
        length = sum(store.lengths[document] for document in documents)
        self.shape = store.layout.shape(name, length)
        self.dtype = store.layout.torch_dtype(name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows of a hidden-state store are read in order, not in steps of {step}")
        parts = []
        offset = 0
        for document in self.documents:
            length = self.store.lengths[document]
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                parts.append(self.store.rows(document, self.name, first, last))
            offset += length
        if not parts:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def index_text(layout: Layout, fingerprint: Fingerprint, shards: Sequence[Shard]) -> str:
    """Contents of `index.json`."""
    index = {
        "format": STORE_FORMAT,
        "layout": asdict(layout),
        "fingerprint": dict(fingerprint),
        "shards": [asdict(shard) for shard in shards],
    }
    return json.dumps(index, indent=1) + "\n"
