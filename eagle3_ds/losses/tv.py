"""Total variation: one minus the chance that a guess is accepted (arXiv 2602.23881, section 3).

    value = TV(p, q) = 1 - alpha        d(value) / dz = -d(alpha) / dz

with alpha = sum_v min(p_v, q_v), see overlap.py. Its gradient vanishes where p and q hardly overlap, so it
suits a draft that another loss has trained before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.draft.tile_loss import TileTerms
from eagle3_ds.losses.overlap import overlap


class TotalVariation:
    """One minus the acceptance."""

    temporaries = 2

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        alpha, gradient, _ = overlap(logits, target)
        return TileTerms(1 - alpha, alpha, gradient.neg_())

    def fused(self, logits: Tensor) -> None:
        """No kernel of its own."""

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        return 1 - torch.minimum(logits.softmax(-1), target).sum(-1)
