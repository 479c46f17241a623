"""The reference kernel: dense attention in plain torch, on any device and in any dtype. It is for checks
only, because its memory grows with Lq * Lk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3_ds.kernels.base import AttentionKernel, accumulation_dtype, sum_over_group
from eagle3_ds.kernels.tile import Tile


class ReferenceKernel(AttentionKernel):
    """Builds the whole mask at once instead of merging tiles, so that it shares no code with the kernels that
    are checked against it. The formulas are those of kernels/base.py.
    """

    name = "reference"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> tuple[Tensor, Tensor]:
        _, _, v_HKD, scores = _scores(q, k, v, tiles, scale)
        lse_HQ = torch.logsumexp(scores, -1)
        # A row without keys has lse -inf; with 0 in its place every p of the row is exp(-inf) = 0, not nan.
        p_HQK = (scores - lse_HQ.nan_to_num(neginf=0.0)[..., None]).exp()
        return (p_HQK @ v_HKD).transpose(0, 1).to(q.dtype).contiguous(), lse_HQ.T.contiguous()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Sequence[Tile],
        scale: float,
        dk_accum: Tensor,
        dv_accum: Tensor,
    ) -> Tensor:
        q_HQD, k_HKD, v_HKD, scores = _scores(q, k, v, tiles, scale)
        dout_HQD = dout.transpose(0, 1).to(scores.dtype)
        p_HQK = (scores - lse.nan_to_num(neginf=0.0).T[..., None]).exp()
        ds_HQK = p_HQK * (dout_HQD @ v_HKD.mT - delta.T[..., None]) * scale
        num_kv_heads, dtype = k.shape[1], dk_accum.dtype
        dk_accum += sum_over_group((ds_HQK.mT @ q_HQD).transpose(0, 1), num_kv_heads, dtype)
        dv_accum += sum_over_group((p_HQK.mT @ dout_HQD).transpose(0, 1), num_kv_heads, dtype)
        return (ds_HQK @ k_HKD).transpose(0, 1).contiguous()


def _scores(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [Hq, Lq, D], k and v [Hq, Lk, D] (key heads repeated) and scores [Hq, Lq, Lk], in the accumulation
    dtype.

    A score is scale * q . k + log n, where n tiles show that key to that row; log 0 = -inf hides the key.
    """
    group = q.shape[1] // k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    q_HQD = q.transpose(0, 1).to(dtype)
    k_HKD, v_HKD = (x.transpose(0, 1).to(dtype).repeat_interleave(group, dim=0) for x in (k, v))
    times_shown = torch.zeros(q.shape[0], k.shape[0], dtype=dtype, device=q.device)
    for tile in tiles:
        shown = torch.ones(tile.num_queries, tile.num_keys, dtype=dtype, device=q.device)
        diagonal = tile.num_keys - tile.num_queries
        if tile.causal:
            shown = shown.tril(diagonal)
        if tile.left is not None:
            shown = shown.triu(diagonal - tile.left)
        times_shown[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += shown
    return q_HQD, k_HKD, v_HKD, q_HQD @ k_HKD.mT * scale + times_shown.log()
