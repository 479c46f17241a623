"""Dense attention under a given mask: the arithmetic behind the emulated operators."""

from __future__ import annotations

import torch
from torch import Tensor


def scores_of(q: Tensor, k: Tensor, scale: float, shown: Tensor) -> Tensor:
    """[Hq, Lq, Lk], -inf where the key is not shown."""
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q, wide).mul(scale).masked_fill(~shown, -torch.inf)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, shown: Tensor) -> tuple[Tensor, Tensor]:
    """out [Lq, Hq, D], lse [Hq, Lq]."""
    assert shown.any(-1).all(), "the kernel made an empty row"
    scores = scores_of(q, k, scale, shown)
    wide = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide), scores.logsumexp(-1)


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, shown: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv under a given lse [Hq, Lq], delta being the row sum of dout * out."""
    group = q.shape[1] // k.shape[1]
    p = (scores_of(q, k, scale, shown) - lse[..., None]).exp()
    dp = torch.einsum("qhd,khd->hqk", dout, v.repeat_interleave(group, dim=1))
    ds = p * (dp - (dout * out).sum(-1).T[..., None]) * scale
    dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(group, dim=1))
    dk = torch.einsum("hqk,qhd->khd", ds, q).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", p, dout).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv
