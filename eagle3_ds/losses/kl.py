"""Soft cross entropy against the teacher: the Kullback-Leibler divergence plus the teacher's entropy, which
is constant.

    value = -sum_v p_v log q_v = lse(z) - sum_v p_v z_v        d(value) / dz = q - p

with logits z, q = softmax(z) and the teacher's probabilities p, which sum to one in each column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.device.kinds import runs_triton
from eagle3_ds.draft.tile_loss import FusedTerms, TileTerms


class KL:
    """Soft cross entropy, the loss of the EAGLE-3 paper."""

    temporaries = 0

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        lse = logits.logsumexp(-1)
        value = lse - torch.linalg.vecdot(target, logits)
        dlogits = logits.sub_(lse[:, None]).exp_().sub_(target)
        # sum min(p, q) = 1 - 1/2 sum |q - p|; rounding may make it slightly negative.
        acceptance = (1 - 0.5 * torch.linalg.vector_norm(dlogits, 1, dim=-1)).clamp(min=0)
        return TileTerms(value, acceptance, dlogits)

    def fused(self, logits: Tensor) -> FusedTerms | None:
        """On CUDA, where each pass over a tile costs what reading it from memory costs. It computes in fp32,
        so fp64 (gradient checks) stays with torch.
        """
        if not runs_triton(logits.device.type) or logits.dtype == torch.float64:
            return None
        from eagle3_ds.losses.kl_triton import fused_kl

        return fused_kl

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(-1)).sum(-1)
