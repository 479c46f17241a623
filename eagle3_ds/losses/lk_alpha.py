"""The negative logarithm of the acceptance (arXiv 2602.23881: LK-alpha).

    value = -log alpha        d(value) / dz = -1 / alpha * d(alpha) / dz

with alpha = sum_v min(p_v, q_v), see overlap.py. The factor 1 / alpha lifts the gradient of total variation
where p and q hardly meet; against a teacher that is sure of one token it is the cross entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.draft.tile_loss import TileTerms
from eagle3_ds.losses.overlap import overlap

SMALLEST = 1e-12
"""Below it alpha counts as this, and has no gradient: the logarithm stays finite."""


class LKAlpha:
    """-log(acceptance)."""

    temporaries = 2

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        alpha, gradient, _ = overlap(logits, target)
        factor = torch.where(alpha < SMALLEST, 0.0, -1 / alpha.clamp(min=SMALLEST))
        return TileTerms(-alpha.clamp(min=SMALLEST).log(), alpha, gradient.mul_(factor[:, None]))

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        return -torch.minimum(logits.softmax(-1), target).sum(-1).clamp(min=SMALLEST).log()
