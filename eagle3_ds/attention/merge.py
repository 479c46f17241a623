"""One softmax over the step-0 keys and the diagonal keys: merging by log-sum-exp, and its gradient.

The step-0 attention (out0, lse0) takes part as one key with score lse0 and value out0. With the diagonals
s = 1 .. k of a slot:

    z_0 = lse0        z_s = scale * q . k_s        lse = log sum_s exp(z_s)        p_s = exp(z_s - lse)
    out = p_0 out0 + sum_{s >= 1} p_s v_s

Backward, with delta = rowsum(dout * out) of the merged output:

    dz_s = p_s (dout . v_s - delta)        dv_s = p_s dout
    dq = scale * sum_{s >= 1} dz_s k_s        dk_s = scale * dz_s q        (s >= 1)

The step-0 part of dq, and the step-0 dk and dv, come from the attention kernel, which gets the merged lse and
delta (kernels/base.py); so out0 and lse0 need no gradient of their own. k_s and v_s belong to a key head:
their gradients are summed over its G query heads.

On CUDA this is one fused Triton kernel each way (merge_triton.py). Elsewhere it is plain torch, block by
block, so that the temporaries stay small. Everything is computed in at least fp32.

Legend: S slots, Hq = N * G query heads, N key heads, D head size, B slots of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eagle3_ds.device.kinds import runs_triton
from eagle3_ds.kernels import accumulation_dtype

# Bytes of one temporary: small beside the operands, but large enough that the cost of the calls does not
# matter. Measured on one core, forward with 4096 slots, 8 heads of 64, 7 diagonals, fp32: 0.5 MiB 9.0 ms,
# 1 MiB 8.4 ms, 2 MiB 8.0 ms, no blocks 8.2 ms.
_BLOCK_BYTES = 2**21


def merge_diagonals(
    out0: Tensor, lse0: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Add the diagonal keys, each seen by its own slot alone, to the step-0 attention.

    Args:
        out0: [S, Hq, D], attention over the step-0 keys; lse0: [S, Hq], its log-sum-exp, fp32 (fp64 for
            fp64).
        q: [S, Hq, D]; keys, values: one [S, N, D] per step s = 1 .. k.
        scale: factor of the scores.

    Returns:
        The merged output [S, Hq, D] in the dtype of q, and the merged log-sum-exp [S, Hq] in the dtype of
        lse0.
    """
    if not keys:
        return out0.to(q.dtype), lse0
    if _is_fused(q):
        # Imported here, because machines without CUDA need not have Triton.
        from eagle3_ds.attention.merge_triton import fused_merge

        return fused_merge(out0, lse0, q, keys, values, scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse0, memory_format=torch.contiguous_format)
    for rows in _blocks(q):
        q_BNGD, out_BNGD = (_grouped(x[rows], keys[0]) for x in (q, out0))
        # z_0 first, then the scores of the diagonals.
        scores = [lse0[rows].unflatten(1, q_BNGD.shape[1:3])]
        scores += [(q_BNGD * _wide(key[rows])).sum(-1).mul_(scale) for key in keys]
        scores_KBNG = torch.stack(scores)
        lse_BNG = scores_KBNG.logsumexp(0)
        weights = scores_KBNG.sub_(lse_BNG).exp_().unsqueeze(-1).unbind(0)
        merged = out_BNGD * weights[0]
        for weight, value in zip(weights[1:], values, strict=True):
            merged.addcmul_(weight, _wide(value[rows]))
        out[rows], lse[rows] = merged.flatten(1, 2), lse_BNG.flatten(1, 2)
    return out, lse


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
    """Gradients of q and of the diagonal keys and values, through the diagonal scores only (formulas above).

    Args:
        dout: [S, Hq, D], gradient of the merged output; q, keys, values, scale: as in `merge_diagonals`.
        lse: [S, Hq], merged; delta: [S, Hq], row sum of dout * merged output. Both fp32 (fp64 for fp64).
        dkeys, dvalues: one [S, N, D] per diagonal, contiguous, in the dtype of the keys; the gradients are
            added to them in place.

    Returns:
        The diagonal part of dq, [S, Hq, D] in the dtype of q.
    """
    if _is_fused(q):
        from eagle3_ds.attention.merge_triton import fused_merge_backward

        return fused_merge_backward(dout, q, keys, values, lse, delta, scale, dkeys, dvalues)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in _blocks(q):
        q_BNGD, dout_BNGD = (_grouped(x[rows], keys[0]) for x in (q, dout))
        lse_BNG, delta_BNG = (x[rows].unflatten(1, q_BNGD.shape[1:3]) for x in (lse, delta))
        dq_BNGD = torch.zeros_like(q_BNGD)
        for key, value, dkey, dvalue in zip(keys, values, dkeys, dvalues, strict=True):
            k_BN1D, v_BN1D = _wide(key[rows]), _wide(value[rows])
            p_BNG = (q_BNGD * k_BN1D).sum(-1).mul_(scale).sub_(lse_BNG).exp_()
            # scale * dz: both dq and dk carry the factor.
            ds_BNG = (dout_BNGD * v_BN1D).sum(-1).sub_(delta_BNG).mul_(p_BNG).mul_(scale)
            dq_BNGD.addcmul_(ds_BNG[..., None], k_BN1D)
            _add_over_group(dkey[rows], ds_BNG, q_BNGD)
            _add_over_group(dvalue[rows], p_BNG, dout_BNGD)
        dq[rows] = dq_BNGD.flatten(1, 2)
    return dq


def _is_fused(q: Tensor) -> bool:
    """Whether the Triton kernels run. They compute in fp32, so fp64 (gradient checks) stays with torch."""
    return runs_triton(q.device.type) and q.dtype != torch.float64


def _add_over_group(total_BND: Tensor, weight_BNG: Tensor, x_BNGD: Tensor) -> None:
    """total[b, n] += sum_g weight[b, n, g] * x[b, n, g], rounded once to the dtype of total."""
    wide = total_BND.to(weight_BNG.dtype)
    for weight_BN, x_BND in zip(weight_BNG.unbind(2), x_BNGD.unbind(2), strict=True):
        wide.addcmul_(weight_BN[..., None], x_BND)
    if wide is not total_BND:
        total_BND.copy_(wide)


def _blocks(q: Tensor) -> Iterator[slice]:
    row_bytes = q[0].numel() * torch.finfo(accumulation_dtype(q.dtype)).bits // 8
    size = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(q), size):
        yield slice(start, start + size)


def _grouped(x_BHD: Tensor, key: Tensor) -> Tensor:
    """[B, N * G, D] -> [B, N, G, D] in the accumulation dtype; query heads n * G + g share key head n."""
    return x_BHD.unflatten(1, (key.shape[1], -1)).to(accumulation_dtype(x_BHD.dtype))


def _wide(x_BND: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, 1, D] in the accumulation dtype."""
    return x_BND[:, :, None].to(accumulation_dtype(x_BND.dtype))
