"""Writing a hidden-state store so that a crash loses at most one shard.

The store grows in the folder `<path>.partial`. A shard is written under a hidden name, flushed and renamed, and
carries the list of its documents in its own header: what has its final name is whole. The index comes last, then the
folder gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.data.fingerprint import Fingerprint, require_same
from eagle3_ds.data.store import (
    DTYPES,
    INDEX_FILE,
    TENSOR_NAMES,
    HiddenStateStore,
    Layout,
    Shard,
    TensorName,
    file_sha256,
    index_text,
    tensor_crc32,
)

SHARD_BYTES = 2**30
SHARD_OVERHEAD = 4096
"""Bytes of header and table per document, rounded up generously."""


def required_bytes(lengths: Mapping[int, int], layout: Layout) -> int:
    """Disk bytes that documents of these lengths (document_id -> tokens) take."""
    return sum(lengths.values()) * layout.row_bytes + len(lengths) * SHARD_OVERHEAD


def require_disk_space(path: Path, required: int) -> None:
    """Raises ValueError when the file system of `path` has less than `required` bytes free."""
    free = shutil.disk_usage(path).free
    if required > free:
        raise ValueError(
            f"the hidden states take {required:,} bytes and {path} has {free:,} free: free some space, put "
            "data.cache_dir on "
            "another disk, or use fewer or shorter conversations (data.max_conversations, data.max_length)"
        )


class HiddenStateWriter:
    """Fills the store at `path` with the documents of `lengths` ({document_id: tokens}), in any order.

    Continues an interrupted capture: `missing()` lists what is still to do. Several processes may write at once, each
    with its own `rank` and its own documents; after all have called `flush()`, one of them calls `finish()`. Raises
    ValueError when the disk is too small or the interrupted capture was made from something else.
    """

    def __init__(
        self,
        path: str | Path,
        lengths: Mapping[int, int],
        layout: Layout,
        fingerprint: Fingerprint,
        shard_bytes: int = SHARD_BYTES,
        rank: int = 0,
    ) -> None:
        if layout.dtype not in DTYPES:
            raise ValueError(f"data.hidden_dtype is {layout.dtype!r}: use one of {', '.join(DTYPES)}")
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.lengths = dict(lengths)
        self.layout = layout
        self.fingerprint = dict(fingerprint)
        self._identity = {**fingerprint, "layout": f"{layout.aux_width} + {layout.teacher_width} {layout.dtype}"}
        self.shard_bytes = shard_bytes
        self.rank = rank
        self._tensors: dict[str, Tensor] = {}
        self._pending: list[tuple[int, int, dict[str, int]]] = []
        self._pending_bytes = 0
        if (self.path / INDEX_FILE).is_file():
            raise ValueError(f"there is a complete hidden-state store at {self.path}: open it, or remove the folder first")
        self.partial.mkdir(parents=True, exist_ok=True)
        for leftover in self.partial.glob(f".shard-{rank:04d}-*"):
            leftover.unlink()
        self._written = self._read_written()
        missing = {document: self.lengths[document] for document in self.missing()}
        require_disk_space(self.partial, required_bytes(missing, layout))

    def missing(self) -> list[int]:
        """Documents not yet in a shard on disk, in the order of `lengths`."""
        return [document for document in self.lengths if document not in self._written]

    def append(self, document_id: int, aux: Tensor, teacher: Tensor, teacher_token: Tensor) -> None:
        """Add one document: aux [L, aux_width], teacher [L, teacher_width], teacher_token [L]; cast to the store's
        dtypes.

        Raises ValueError for wrong shapes and for values that are not finite in the store's dtype.
        """
        assert document_id in self.lengths, f"document {document_id} is not one of the store's"
        assert document_id not in self._written, f"document {document_id} is in the store already"
        length = self.lengths[document_id]
        checksums: dict[str, int] = {}
        given = dict(zip(TENSOR_NAMES, (aux, teacher, teacher_token), strict=True))
        for name, tensor in given.items():
            stored = self._convert(name, tensor, document_id, length)
            self._tensors[f"{name}.{document_id}"] = stored
            checksums[name] = tensor_crc32(stored)
        self._pending.append((document_id, length, checksums))
        self._written.add(document_id)
        self._pending_bytes += length * self.layout.row_bytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the documents that wait in memory as one shard."""
        if not self._pending:
            return
        number = 1 + max((int(file.stem.split("-")[2]) for file in self._shard_files(self.rank)), default=-1)
        name = f"shard-{self.rank:04d}-{number:06d}.safetensors"
        aside = self.partial / f".{name}"
        metadata = {"documents": json.dumps(self._pending), "identity": json.dumps(self._identity)}
        save_file(self._tensors, aside, metadata=metadata)
        _sync(aside)
        os.rename(aside, self.partial / name)
        _sync(self.partial)
        self._tensors, self._pending, self._pending_bytes = {}, [], 0

    def finish(self) -> HiddenStateStore:
        """Write the last shard and the index, give the folder its name, and open the store.

        Raises ValueError when documents are missing or two shards hold the same one.
        """
        self.flush()
        shards = [self._describe(file) for file in self._shard_files()]
        held = [document for shard in shards for document, _, _ in shard.documents]
        absent = set(self.lengths) - set(held)
        if absent or len(held) != len(self.lengths):
            raise ValueError(
                f"the capture into {self.partial} has {len(held)} documents ({len(set(held))} different) instead of "
                f"{len(self.lengths)}; missing: {sorted(absent)[:5]}. Capture these, or remove the folder and start "
                "again"
            )
        aside = self.partial / f".{INDEX_FILE}"
        aside.write_text(index_text(self.layout, self.fingerprint, shards))
        _sync(aside)
        os.rename(aside, self.partial / INDEX_FILE)
        _sync(self.partial)
        os.rename(self.partial, self.path)
        _sync(self.path.parent)
        return HiddenStateStore.open(self.path, self.fingerprint)

    def _convert(self, name: TensorName, tensor: Tensor, document_id: int, length: int) -> Tensor:
        expected = self.layout.shape(name, length)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} of document {document_id} has shape {tuple(tensor.shape)}, expected {expected}")
        stored = tensor.detach().to("cpu", self.layout.torch_dtype(name)).contiguous()
        if stored.is_floating_point() and not torch.isfinite(stored).all():
            raise ValueError(
                f"{name} of document {document_id} is not finite as {self.layout.dtype} (largest input "
                f"{tensor.abs().max().item():.4g}): set data.hidden_dtype to bfloat16 or float32, or mend the target"
            )
        return stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored

    def _shard_files(self, rank: int | None = None) -> list[Path]:
        return sorted(self.partial.glob(f"shard-{'*' if rank is None else f'{rank:04d}'}-*.safetensors"))

    def _read_written(self) -> set[int]:
        """Documents in the shards an earlier run left; refuses shards made from something else."""
        written: set[int] = set()
        for file in self._shard_files():
            with safe_open(file, framework="pt") as shard:
                metadata = shard.metadata()
            fix = f"remove the folder {self.partial} to start again"
            require_same(json.loads(metadata["identity"]), self._identity, str(file), fix)
            written.update(document for document, _, _ in json.loads(metadata["documents"]))
        return written

    def _describe(self, file: Path) -> Shard:
        with safe_open(file, framework="pt") as shard:
            documents = json.loads(shard.metadata()["documents"])
        return Shard(file.name, file.stat().st_size, file_sha256(file), documents)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk before anything is built on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
