"""Rows as a store keeps them: float8 codes with their exponents, and one checksum per row.

Legend: L rows, W width, H width of one hidden state (an aux row is three of them side by side), G = W / H.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

LARGEST_CODE = 448.0
"""Largest finite value of float8_e4m3fn, 0.875 * 2**9."""
LARGEST_FLOAT8 = LARGEST_CODE * 2.0**119
"""Largest value with a code and an exponent: a larger one could be rounded up to infinity."""
ROWS_AT_ONCE = 4096
"""Rows whose fp32 copies exist at a time while a document of any length is encoded."""


def encode_float8(rows: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Codes and exponents of `rows` [L, W] of values up to `LARGEST_FLOAT8`, so that `codes * 2**exponents`
    is close to them.

    Every hidden state of every row has an exponent of its own, the smallest with which its largest value
    fits: later layers are far larger than early ones, and a few tokens far larger than the rest. A power of
    two takes a byte and makes decoding to bfloat16 exact; a scale of maximum / 448 comes hardly closer
    (measured, docs/lab-notes.md).

    Returns:
        float8_e4m3fn [L, W] and int8 [L, G].
    """
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    exponents = torch.empty(len(rows), rows.shape[1] // hidden_size, dtype=torch.int8)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = rows[start : start + ROWS_AT_ONCE].float().unflatten(1, (-1, hidden_size))
        mantissa, exponent = torch.frexp(piece.abs().amax(-1))
        # amax = mantissa * 2**exponent with mantissa in [0.5, 1): it fits under 0.875 * 2**9 as it is, or
        # halved once.
        exponent = (exponent - 9 + (mantissa > 0.875).int()).clamp(-126, 127)
        codes[start : start + len(piece)] = (
            (piece * power_of_two(-exponent)[..., None]).flatten(1).to(codes.dtype)
        )
        exponents[start : start + len(piece)] = exponent.to(torch.int8)
    return codes, exponents


def decode_float8(codes: Tensor, exponents: Tensor) -> Tensor:
    """The rows bfloat16 [L, W] of codes [L, W] and exponents int8 [L, G]; exact."""
    scale = power_of_two(exponents.int()).bfloat16()
    return (codes.bfloat16().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in fp32 for int32 exponents in [-126, 127], by its bits: a vector unit's exp2 may round."""
    return ((exponent + 127) << 23).view(torch.float32)


def first_beyond(rows: Tensor, limit: float) -> int | None:
    """The first row of `rows` [L, W] with a NaN or a value beyond +-limit; None without one."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        fits = (rows[start : start + ROWS_AT_ONCE].abs() <= limit).all(-1)
        if not fits.all():
            return start + int(fits.logical_not().nonzero()[0])
    return None


def row_checksums(tensor: Tensor) -> Tensor:
    """crc32 of the bytes of each row of `tensor` [L] or [L, W], as the bits of an int32 [L]."""
    rows = tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1).numpy()
    sums = np.fromiter((zlib.crc32(row.data) for row in rows), dtype=np.uint32, count=len(rows))
    return torch.from_numpy(sums.view(np.int32))


def crc32(tensor: Tensor) -> int:
    """crc32 of all bytes of `tensor`."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
