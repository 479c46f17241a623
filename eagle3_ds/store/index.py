"""What a hidden-state store is on disk: the tensors of a piece, the shards, and the index that names them.

Everything read here may have been damaged, or written by somebody else: nothing of it is used before it was
checked.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json

INDEX_FILE = "index.json"
STORE_FORMAT: Final = 2
LARGEST_INDEX = 2**30
"""Bytes. A piece takes about 40 in the index, so this is far above any store."""
LARGEST_HEADER = 100_000_000
"""Bytes, the limit of safetensors itself."""
FLOAT8 = "float8"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    FLOAT8: torch.float8_e4m3fn,
}
ColumnName = Literal["aux", "teacher", "teacher_token"]
HIDDEN: tuple[ColumnName, ...] = ("aux", "teacher")
CHECKSUM = "checksum"

Count = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Index = Annotated[int, Field(strict=True, ge=0, le=2**62)]
Crc32 = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class RowFormat:
    """Widths and dtype that all documents of a store share. `teacher_width` is the target's hidden size."""

    aux_width: Count
    teacher_width: Count
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"data.hidden_dtype is {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.dtype == FLOAT8 and self.aux_width % self.teacher_width:
            raise ValueError(
                f"data.hidden_dtype is float8, and aux rows of {self.aux_width} are not hidden states of "
                f"{self.teacher_width} side by side, which share an exponent each: use another "
                "data.hidden_dtype"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in a shard, its checksums included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(1).values())

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype that hidden states are read in: the stored one, and bfloat16 for float8, which it holds
        exactly.
        """
        return torch.bfloat16 if self.dtype == FLOAT8 else DTYPES[self.dtype]

    def width(self, name: ColumnName) -> tuple[int, ...]:
        """Shape of one row."""
        return {"aux": (self.aux_width,), "teacher": (self.teacher_width,), "teacher_token": ()}[name]

    def tensors(self, length: int) -> dict[str, TensorSpec]:
        """The tensors of a piece of `length` rows, the checksums of all others last."""
        specs: dict[str, TensorSpec] = {}
        for name in HIDDEN:
            specs[name] = TensorSpec((length, *self.width(name)), DTYPES[self.dtype])
        specs["teacher_token"] = TensorSpec((length,), torch.int32)
        if self.dtype == FLOAT8:
            for name in HIDDEN:
                (width,) = self.width(name)
                specs[exponent_of(name)] = TensorSpec((length, width // self.teacher_width), torch.int8)
        specs[CHECKSUM] = TensorSpec((length, len(specs)), torch.int32)
        return specs


def exponent_of(name: str) -> str:
    """Name of the tensor with the float8 exponents of a column."""
    return f"{name}_exponent"


class Piece(NamedTuple):
    """Rows [start, start + length) of a document, stored together. `checksum_crc32` is that of its checksum
    tensor.
    """

    document: Index
    start: Index
    length: Count
    checksum_crc32: Crc32

    @property
    def stop(self) -> int:
        return self.start + self.length

    def key(self, name: str) -> str:
        """Name of one of its tensors in the shard."""
        return f"{name}.{self.document}.{self.start}"


PIECES = TypeAdapter(list[Piece])
IDENTITY = TypeAdapter(dict[str, str])


class Shard(BaseModel):
    """One file. Every byte is covered: the header by `header_crc32`, the rest by the pieces' checksums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # A plain name, so that no index can lead out of its folder.
    file: Annotated[str, Field(pattern=r"^shard-[0-9]{4,9}-[0-9]{6,9}\.safetensors$")]
    bytes: Count
    header_crc32: Crc32
    pieces: list[Piece]


class StoreIndex(BaseModel):
    """Contents of index.json. `origin` says who computed the hidden states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2]
    origin: str
    layout: RowFormat
    fingerprint: dict[str, str]
    shards: list[Shard]

    @model_validator(mode="after")
    def _consistent(self) -> StoreIndex:
        row_bytes = self.layout.row_bytes
        for shard in self.shards:
            rows = sum(piece.length for piece in shard.pieces)
            if rows * row_bytes > shard.bytes:
                raise ValueError(
                    f"{rows} rows of {row_bytes} bytes do not fit into the {shard.bytes} bytes of "
                    f"{shard.file}"
                )
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is named twice")
        for document, pieces in pieces_by_document(self.shards).items():
            last = max(piece.stop for piece, _ in pieces)
            if not covers(((piece.start, piece.stop) for piece, _ in pieces), last):
                raise ValueError(f"document {document} has a gap in its {last} rows")
        return self


def pieces_by_document(shards: Sequence[Shard]) -> dict[int, list[tuple[Piece, Shard]]]:
    """Every piece with its shard, by document."""
    found: dict[int, list[tuple[Piece, Shard]]] = {}
    for shard in shards:
        for piece in shard.pieces:
            found.setdefault(piece.document, []).append((piece, shard))
    return found


def covers(spans: Iterable[tuple[int, int]], length: int) -> bool:
    """Whether the [start, stop) spans together hold every row of [0, length); they may overlap."""
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= length


def read_index(folder: Path) -> StoreIndex:
    """The checked index of the store in `folder`.

    Raises:
        ValueError: none there, of another format, or one that cannot be a store's.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise ValueError(
            f"no hidden-state store at {folder}: {INDEX_FILE} is missing. Capture the hidden states (an "
            "interrupted capture continues where it stopped)"
        )
    again = f"remove the folder {folder} and capture again"
    if file.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no index has: {again}")
    content = file.read_bytes()
    try:
        parsed = from_json(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {again}") from error
    stored_format = parsed.get("format") if isinstance(parsed, dict) else None
    if stored_format != STORE_FORMAT:
        raise ValueError(f"{file} has format {stored_format!r}, this version reads {STORE_FORMAT}: {again}")
    try:
        return StoreIndex.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "index"
        problem = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{file} is damaged ({place}: {problem}): {again}") from error


def shard_header(path: Path) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, then the JSON.

    Raises:
        ValueError: too short, or a length that no header has.
    """
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        header = stream.read(length) if length <= LARGEST_HEADER else b""
    if len(prefix) < 8 or len(header) < length:
        raise ValueError(f"{path} has no safetensors header")
    return prefix + header


def header_crc32(path: Path) -> int:
    """Checksum of `shard_header`. Raises ValueError as it does."""
    return zlib.crc32(shard_header(path))
