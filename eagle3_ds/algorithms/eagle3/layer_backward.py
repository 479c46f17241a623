"""The gradient of a layer's arithmetic, by hand: what a tile must repeat of the forward pass, and no matmul
more.

Autograd would need the outputs of the projections and of `down` to hang the graph on; their gradients need
only their inputs. Weight gradients are added to the caller's sums, in the sums' dtype. The norms are left to
torch, which has fused kernels.

Legend: t slots of a tile, H hidden size, Hq / Hkv heads, D head size, I width of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3.layer import BeforeWeights
from eagle3_ds.attention.rotary import rotate
from eagle3_ds.draft.decoder_backward import NormTile, accumulate_product


def project_backward(
    embeds: Tensor,
    hidden: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    weights: BeforeWeights,
    sums: BeforeWeights,
    eps: float,
) -> Tensor:
    """Backward of the input norms and the projections.

    Args:
        embeds, hidden: [t, H], what the norms read.
        gradients: of rotated q [t, Hq, D] ([0, Hq, D] of slots that have none), rotated k and v [t, Hkv, D].
        angles: cos and sin [t, D] of the rotation.

    Returns:
        dhidden [t, H].
    """
    cos, sin = angles
    dq, dk, dv = gradients
    # The transpose of a rotation turns back.
    turned_q = rotate(dq, cos, -sin) if len(dq) else dq
    columns = (turned_q.flatten(1), rotate(dk, cos, -sin).flatten(1), dv.flatten(1))
    if weights.hidden_norm is None:
        norms = [(NormTile(hidden, weights.input_norm, eps), sums.input_norm)]
    else:
        assert sums.hidden_norm is not None
        norms = [
            (NormTile(embeds, weights.input_norm, eps), sums.input_norm),
            (NormTile(hidden, weights.hidden_norm, eps), sums.hidden_norm),
        ]
    x = torch.cat([norm.output for norm, _ in norms], dim=-1)
    dx = torch.zeros_like(x)
    for column, weight, total in zip(columns, weights[:3], sums[:3], strict=True):
        assert weight is not None and total is not None
        if not len(column):
            continue
        accumulate_product(total, column.T, x)
        dx.addmm_(column, weight)
    # The embedding is frozen: the first of two norms hands out its weight's gradient, the last one the hidden
    # state's too.
    parts = [
        norm.backward(part, total)
        for (norm, total), part in zip(norms, dx.chunk(len(norms), dim=-1), strict=True)
    ]
    return parts[-1]
