"""The format of a hidden-state store: the tensors of a piece, the shards, and the index that lists them.

A *piece* is a run of rows of one document that are stored together, a *shard* a safetensors file of pieces.
What is read here may be damaged or come from somebody else; it is checked before it is used.
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
"""Bytes of index.json. A piece takes about 40 of them, so no real store comes near this."""
LARGEST_HEADER = 100_000_000
"""Bytes of a shard's header; safetensors has the same limit."""
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
        """Bytes that one token takes in a shard, checksums included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(1).values())

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype of hidden states as they are read: the stored dtype, but bfloat16 for float8, whose values it
        holds exactly.
        """
        return torch.bfloat16 if self.dtype == FLOAT8 else DTYPES[self.dtype]

    def width(self, name: ColumnName) -> tuple[int, ...]:
        """Shape of one row of a column."""
        return {"aux": (self.aux_width,), "teacher": (self.teacher_width,), "teacher_token": ()}[name]

    def tensors(self, length: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the tensors of a piece of `length` rows, by name. The last tensor holds the
        row checksums of the others, one column for each.
        """
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
    """Rows [start, start + length) of a document, stored together in one shard. `checksum_crc32` is the crc32
    of the piece's checksum tensor.
    """

    document: Index
    start: Index
    length: Count
    checksum_crc32: Crc32

    @property
    def stop(self) -> int:
        return self.start + self.length

    def key(self, name: str) -> str:
        """Name of one of the piece's tensors in the shard, for example `aux.17.0`."""
        return f"{name}.{self.document}.{self.start}"


PIECES = TypeAdapter(list[Piece])
IDENTITY = TypeAdapter(dict[str, str])


class Shard(BaseModel):
    """One safetensors file. A checksum covers each of its bytes: `header_crc32` the header, the pieces' row
    checksums the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # A plain name without separators: an index cannot name a file outside its folder.
    file: Annotated[str, Field(pattern=r"^shard-[0-9]{4,9}-[0-9]{6,9}\.safetensors$")]
    bytes: Count
    header_crc32: Crc32
    pieces: list[Piece]


class StoreIndex(BaseModel):
    """The content of index.json. `origin` says which program computed the hidden states."""

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
    """{document id: its pieces, each with the shard that holds it}."""
    found: dict[int, list[tuple[Piece, Shard]]] = {}
    for shard in shards:
        for piece in shard.pieces:
            found.setdefault(piece.document, []).append((piece, shard))
    return found


def covers(spans: Iterable[tuple[int, int]], length: int) -> bool:
    """Whether the spans [start, stop), which may overlap, cover every row of [0, length)."""
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= length


def read_index(folder: Path) -> StoreIndex:
    """Read and check the index of the store in `folder`.

    Raises:
        ValueError: there is no index, it has another format, or its content is inconsistent.
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
    """The header of a safetensors file: 8 bytes with its length, then the JSON.

    Raises:
        ValueError: the file is shorter than its header, or the length is above `LARGEST_HEADER`.
    """
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        header = stream.read(length) if length <= LARGEST_HEADER else b""
    if len(prefix) < 8 or len(header) < length:
        raise ValueError(f"{path} has no safetensors header")
    return prefix + header


def header_crc32(path: Path) -> int:
    """The crc32 of `shard_header`.

    Raises:
        ValueError: the file has no safetensors header.
    """
    return zlib.crc32(shard_header(path))
