"""A blend that moves from divergence to acceptance as the draft gets better (arXiv 2602.23881: LK-lambda).

    value = lambda KL(p, q) + (1 - lambda) TV(p, q)
    d(value) / dz = lambda (q - p) - (1 - lambda) d(alpha) / dz

with alpha = sum_v min(p_v, q_v), see overlap.py, and lambda = exp(-eta alpha), a constant for the gradient.
Each column has its own lambda, so that the loss does not depend on how a sequence is cut over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3_ds.draft.tile_loss import TileTerms
from eagle3_ds.losses.overlap import overlap


class LKLambda:
    """A blend of KL and total variation, by each column's acceptance.

    Attributes:
        eta: the larger it is, the sooner total variation takes over; 0 gives KL alone.
    """

    temporaries = 2

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        # KL = lse(z) - sum p z + sum p log p.
        divergence = logits.logsumexp(-1) - torch.linalg.vecdot(target, logits)
        divergence += torch.special.xlogy(target, target).sum(-1)
        alpha, gradient, q = overlap(logits, target)
        weight = (-self.eta * alpha).exp()
        value = weight * divergence + (1 - weight) * (1 - alpha)
        gradient.mul_(weight[:, None] - 1)
        return TileTerms(value, alpha, gradient.addcmul_(q.sub_(target), weight[:, None]))

    def fused(self, logits: Tensor) -> None:
        """No kernel of its own."""

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        divergence = (torch.special.xlogy(target, target) - target * log_q).sum(-1)
        alpha = torch.minimum(log_q.exp(), target).sum(-1)
        weight = (-self.eta * alpha.detach()).exp()
        return weight * divergence + (1 - weight) * (1 - alpha)
