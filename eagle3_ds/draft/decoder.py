"""The arithmetic of a decoder layer that every draft shares, as functions of explicit weights.

Serving and training share it so, and training can repeat a tile of it in backward with leaves of its own.

Legend: S slots, H hidden size, Hq heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class AfterWeights(NamedTuple):
    """What follows the attention."""

    o: Tensor
    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in fp32 at least, in the dtype of x."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def project(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """[S, in] -> [S, heads, D]."""
    return functional.linear(x, weight).unflatten(-1, (-1, head_dim))


def after_attention(hidden: Tensor, attended: Tensor, weights: AfterWeights, eps: float) -> Tensor:
    """hidden [S, H], attended [S, Hq * D] -> the layer's output [S, H]."""
    hidden = hidden + functional.linear(attended, weights.o)
    x = rms_norm(hidden, weights.norm, eps)
    gated = functional.silu(functional.linear(x, weights.gate)) * functional.linear(x, weights.up)
    return hidden + functional.linear(gated, weights.down)
