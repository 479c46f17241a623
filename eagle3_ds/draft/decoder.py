"""The arithmetic of a Llama decoder layer, as functions that take their weights as arguments.

So serving and training share it, and training can repeat it for one tile of slots in backward.

Legend: S slots, H hidden size, Hq heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class AfterWeights(NamedTuple):
    """The weights of what follows the attention.

    Attributes:
        o: [H, Hq * D], the output projection.
        norm: [H], of the RMSNorm before the MLP.
        gate, up: [I, H]; down: [H, I], the MLP, I its width.
    """

    o: Tensor
    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in at least
    fp32, in the dtype of x.
    """
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def project(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """x [S, in], weight [heads * D, in] -> x weight^T as [S, heads, D]."""
    return functional.linear(x, weight).unflatten(-1, (-1, head_dim))


def after_attention(hidden: Tensor, attended: Tensor, weights: AfterWeights, eps: float) -> Tensor:
    """The output projection, the MLP and their residuals.

        h = hidden + attended o^T        x = norm(h)        output = h + (silu(x gate^T) * (x up^T)) down^T

    Args:
        hidden: [S, H], the residual; attended: [S, Hq * D], the attention's output.
        weights: of the layer; eps: of its norm.

    Returns:
        The layer's output [S, H].
    """
    hidden = hidden + functional.linear(attended, weights.o)
    x = rms_norm(hidden, weights.norm, eps)
    gated = functional.silu(functional.linear(x, weights.gate)) * functional.linear(x, weights.up)
    return hidden + functional.linear(gated, weights.down)
