"""One softmax over the step-0 keys and the diagonal keys: merging by log-sum-exp, and its gradient.

Legend: S slots, G query heads per key head, N key heads, D head size. Everything is computed in at least fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3_ds.kernels import accumulation_dtype


def _grouped(x_SHD: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    slots, heads, dim = x_SHD.shape
    return x_SHD.reshape(slots, num_kv_heads, heads // num_kv_heads, dim).to(dtype)


def merge_diagonals(
    out0: Tensor, lse0: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Add the diagonal keys, each seen by its own slot alone, to the step-0 attention.

    Args:
        out0: [S, N * G, D] attention over the step-0 keys; lse0: [S, N * G] its log-sum-exp.
        q: [S, N * G, D]; keys, values: one [S, N, D] per step s = 1..k.

    Returns:
        The merged output in the dtype of q, and the merged log-sum-exp.
    """
    if not keys:
        return out0.to(q.dtype), lse0
    dtype = accumulation_dtype(q.dtype)
    num_kv_heads = keys[0].shape[1]
    q_SNGD = _grouped(q, num_kv_heads, dtype)
    lse = lse0.to(dtype)
    scores = []
    for key in keys:
        score = (q_SNGD * key[:, :, None].to(dtype)).sum(-1).mul(scale).reshape(lse.shape)
        scores.append(score)
        lse = torch.logaddexp(lse, score)
    out = _grouped(out0, num_kv_heads, dtype) * (lse0 - lse).exp().reshape(q_SNGD.shape[:3])[..., None]
    for score, value in zip(scores, values, strict=True):
        out += (score - lse).exp().reshape(q_SNGD.shape[:3])[..., None] * value[:, :, None].to(dtype)
    return out.reshape(q.shape).to(q.dtype), lse


def merge_diagonals_backward(
    dout: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dkeys: Sequence[Tensor],
    dvalues: Sequence[Tensor],
) -> Tensor:
    """Gradient through the diagonal part: p = exp(s - lse), ds = p (dout . v - delta).

    Args:
        lse, delta: [S, H], of the merged softmax; delta is the row sum of dout * out_merged.
        dkeys, dvalues: one [S, N, D] per diagonal, in the keys' dtype; the gradients are added to them.

    Returns:
        dq [S, H, D] in the dtype of q, the diagonal part only.
    """
    dtype = accumulation_dtype(q.dtype)
    num_kv_heads = keys[0].shape[1]
    q_SNGD, dout_SNGD = _grouped(q, num_kv_heads, dtype), _grouped(dout, num_kv_heads, dtype)
    lse_SNG = lse.reshape(q_SNGD.shape[:3])
    delta_SNG = delta.reshape(q_SNGD.shape[:3])
    dq = torch.zeros_like(q_SNGD)
    for key, value, dkey, dvalue in zip(keys, values, dkeys, dvalues, strict=True):
        k_SN1D, v_SN1D = key[:, :, None].to(dtype), value[:, :, None].to(dtype)
        p_SNG = ((q_SNGD * k_SN1D).sum(-1) * scale - lse_SNG).exp()
        ds_SNG1 = (p_SNG * ((dout_SNGD * v_SN1D).sum(-1) - delta_SNG) * scale)[..., None]
        dq += ds_SNG1 * k_SN1D
        dkey.add_((ds_SNG1 * q_SNGD).sum(2))
        dvalue.add_((p_SNG[..., None] * dout_SNGD).sum(2))
    return dq.reshape(q.shape).to(q.dtype)
