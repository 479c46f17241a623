"""The negative logarithm of the acceptance (arXiv 2602.23881: LK-alpha).

    value = -log alpha        d(value) / dz = -1 / alpha * d(alpha) / dz

with alpha = sum_v min(p_v, q_v), see overlap.py. Total variation has almost no gradient where p and q hardly
overlap; the factor 1 / alpha makes up for it. Against a teacher that is certain of one token the loss is the
cross entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.draft.tile_loss import TileTerms
from eagle3_ds.losses.overlap import overlap

SMALLEST = 1e-12
"""A smaller alpha is replaced by this and gets no gradient, so that the logarithm stays finite."""


class LKAlpha:
    """The negative logarithm of the acceptance."""

    temporaries = 2

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        alpha, gradient, _ = overlap(logits, target)
        factor = torch.where(alpha < SMALLEST, 0.0, -1 / alpha.clamp(min=SMALLEST))
        return TileTerms(-alpha.clamp(min=SMALLEST).log(), alpha, gradient.mul_(factor[:, None]))

    def fused(self, logits: Tensor) -> None:
        """No kernel of its own."""

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        return -torch.minimum(logits.softmax(-1), target).sum(-1).clamp(min=SMALLEST).log()
