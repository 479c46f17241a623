"""The overlap alpha of two distributions and its gradient, for the losses that aim at acceptance: alpha is
the chance that a server which samples accepts the guess.

    alpha = sum_v min(p_v, q_v) = 1 - TV(p, q)
    d(alpha) / dq_v = m_v = 1 where q_v < p_v, else 0 (1/2 where they are equal, as in torch.minimum)
    d(alpha) / dz_v = q_v (m_v - sum_u m_u q_u), because q = softmax(z)
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits, target [t, Vd] -> alpha [t], d(alpha) / d(logits) [t, Vd], and q [t, Vd], which overwrites
    the logits.
    """
    q = logits.sub_(logits.logsumexp(-1)[:, None]).exp_()
    gradient = torch.heaviside(target - q, q.new_tensor(0.5))
    # Where m is 1 the minimum is q, elsewhere it is p.
    alpha = torch.minimum(q, target).sum(-1)
    gradient.sub_(torch.linalg.vecdot(gradient, q)[:, None]).mul_(q)
    return alpha, gradient, q
