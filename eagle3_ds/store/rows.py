"""The encoding of rows in a store: float8 codes with exponents, and one checksum per row.

Legend: L rows, W width of a row, H width of one hidden state, G = W / H hidden states in a row (an aux row
has one for each captured layer). All tensors are on the CPU.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from eagle3_ds.device.kinds import casts_float8

LARGEST_CODE = 448.0
"""Largest finite value of float8_e4m3fn, 0.875 * 2**9."""
LARGEST_FLOAT8 = LARGEST_CODE * 2.0**119
"""Largest value that is encoded: a larger one could be rounded up to infinity."""
ROWS_AT_ONCE = 4096
"""How many rows have an fp32 copy at a time, however long the document is."""


def encode_float8(rows: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Encode rows as float8 codes and exponents, so that `codes * 2**exponents` approximates the rows.

    Each hidden state of each row has its own exponent, the smallest with which its largest value fits: states
    of late layers are far larger than those of early ones, and those of a few tokens far larger than the
    rest. A power of two takes one byte and makes decoding to bfloat16 exact. A scale of maximum / 448 instead
    was measured to be hardly more accurate (docs/lab-notes.md).

    Args:
        rows: [L, W], finite, with absolute values up to `LARGEST_FLOAT8`.
        hidden_size: H.

    Returns:
        Codes float8_e4m3fn [L, W], and exponents int8 [L, G].
    """
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    exponents = torch.empty(len(rows), rows.shape[1] // hidden_size, dtype=torch.int8)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = rows[start : start + ROWS_AT_ONCE].float().unflatten(1, (-1, hidden_size))
        mantissa, exponent = torch.frexp(piece.abs().amax(-1))
        # amax = mantissa * 2**exponent with mantissa in [0.5, 1). Scaled to mantissa * 2**9 it is at most
        # 448 = 0.875 * 2**9 if the mantissa is at most 0.875; else it is halved once more.
        exponent = (exponent - 9 + (mantissa > 0.875).int()).clamp(-126, 127)
        codes[start : start + len(piece)] = (
            (piece * power_of_two(-exponent)[..., None]).flatten(1).to(codes.dtype)
        )
        exponents[start : start + len(piece)] = exponent.to(torch.int8)
    return codes, exponents


def decode_float8(codes: Tensor, exponents: Tensor) -> Tensor:
    """Decode codes float8_e4m3fn [L, W] and exponents int8 [L, G] to rows bfloat16 [L, W], exactly, on the
    device where they are.
    """
    scale = power_of_two(exponents.int()).bfloat16()
    # Where torch does not know float8, a table of the 256 codes says the same.
    known = casts_float8(codes.device.type)
    rows = codes.bfloat16() if known else by_table(codes.view(torch.uint8))
    rows.unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None])
    return rows


def by_table(codes: Tensor) -> Tensor:
    """The bfloat16 of the bits of float8_e4m3fn, uint8 of any shape."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    return every.to(codes.device)[codes.int()]


def fitted(rows: Tensor, dtype: str) -> tuple[Tensor, int | None]:
    """Rows [L, W] on the CPU in `data.hidden_dtype: dtype`, for float8 as they are, to be encoded; and the
    number of the first row that does not fit, or None.
    """
    if dtype == "float8":
        stored, limit = rows.cpu(), LARGEST_FLOAT8
    else:
        wanted = getattr(torch, dtype)
        stored, limit = rows.to("cpu", wanted, copy=True).contiguous(), torch.finfo(wanted).max
    return stored, first_beyond(stored, limit)


def as_stored(rows: Tensor, dtype: str, hidden_size: int) -> Tensor:
    """What a store of `data.hidden_dtype: dtype` gives back for rows [L, W].

    Args:
        hidden_size: H, for float8.

    Raises:
        ValueError: a value is too large for the dtype.
    """
    stored, row = fitted(rows, dtype)
    if row is not None:
        largest = rows[row].abs().max().item()
        raise ValueError(
            f"a hidden state of {largest:.4g} does not fit data.hidden_dtype {dtype}: set it to bfloat16 or "
            "float32"
        )
    return decode_float8(*encode_float8(stored, hidden_size)) if dtype == "float8" else stored


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in fp32, of the same shape, for int32 exponents in [-126, 127]. It is made from its bits,
    because a vectorised exp2 may round.
    """
    return ((exponent + 127) << 23).view(torch.float32)


def first_beyond(rows: Tensor, limit: float) -> int | None:
    """The number of the first row of `rows` [L, W] that has a NaN or a value outside [-limit, limit]; None
    without one.
    """
    for start in range(0, len(rows), ROWS_AT_ONCE):
        fits = (rows[start : start + ROWS_AT_ONCE].abs() <= limit).all(-1)
        if not fits.all():
            return start + int(fits.logical_not().nonzero()[0])
    return None


def row_checksums(tensor: Tensor) -> Tensor:
    """The crc32 of the bytes of each row of `tensor` [L] or [L, W]: int32 [L] with the bits of the unsigned
    checksums.
    """
    rows = tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1).numpy()
    sums = np.fromiter((zlib.crc32(row.data) for row in rows), dtype=np.uint32, count=len(rows))
    return torch.from_numpy(sums.view(np.int32))


def crc32(tensor: Tensor) -> int:
    """The crc32 of all bytes of `tensor`, of any shape."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
