"""The backward of what precedes the attention in a layer, by hand, for one tile of slots. What follows the
attention is in draft/decoder_backward.py, which says why it is done by hand.

With x = concat(norm(embeds), norm(hidden)) and R the rotation of RoPE, forward computes

    q = R(x Wq^T)        k = R(x Wk^T)        v = x Wv^T

R is linear and orthogonal, so its backward is the rotation by the opposite angle, R^T:

    gq = R^T(dq)         gk = R^T(dk)         gv = dv
    dWq = gq^T x         dWk = gk^T x         dWv = gv^T x        dx = gq Wq + gk Wk + gv Wv

The two halves of dx pass through their norms. Only x is repeated from the forward, no projection.

Legend: t slots of a tile, H hidden size, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3.layer import BeforeWeights
from eagle3_ds.attention.rotary import rotate
from eagle3_ds.draft.decoder_backward import NormTile, accumulate_product


def turned_back(
    gradients: tuple[Tensor, Tensor, Tensor], angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the rotation on one tile: gq [t, Hq * D], gk and gv [t, Hkv * D].

    Args:
        gradients: of rotated q [t, Hq, D] ([0, Hq, D] for slots that are not live), rotated k and v
            [t, Hkv, D].
        angles: cos and sin [t, R] of the rotation, of the R channels of a head that turn.
    """
    cos, sin = angles
    dq, dk, dv = gradients
    turned_q = rotate(dq, cos, -sin) if len(dq) else dq
    return turned_q.flatten(1), rotate(dk, cos, -sin).flatten(1), dv.flatten(1)


def project_backward(
    embeds: Tensor,
    hidden: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    weights: BeforeWeights,
    sums: BeforeWeights,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Backward of the input norms and the projections on one tile.

    Args:
        embeds, hidden: [t, H], the inputs of the norms.
        columns: gq, gk and gv, of `turned_back`.
        weights: of the layer.
        sums: the weights' gradients are added to these, of the weights' shapes.
        eps: of the norms.

    Returns:
        dhidden [t, H], and dembeds [t, H]; None in a layer that reads no embedding.
    """
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
    # The last norm is always that of the hidden state.
    parts = [
        norm.backward(part, total)
        for (norm, total), part in zip(norms, dx.chunk(len(norms), dim=-1), strict=True)
    ]
    return parts[-1], parts[0] if len(parts) > 1 else None
