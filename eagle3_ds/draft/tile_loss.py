"""The interface of a loss: its value and its gradient on one tile of logits.

Legend: t columns of a tile, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TileTerms(NamedTuple):
    """The loss on one tile.

    Attributes:
        value: [t], the loss of each column.
        acceptance: [t], sum_v min(p_v, q_v), the chance that a server which samples accepts the guess. p is
            the teacher's distribution restricted to the draft vocabulary, q the draft's.
        dlogits: [t, Vd], d(value) / d(logits), without any weight; may share the memory of the logits.
    """

    value: Tensor
    acceptance: Tensor
    dlogits: Tensor


class WeightedTerms(NamedTuple):
    """`TileTerms` whose gradient has been written where it was wanted.

    Attributes:
        value, acceptance: [t], of the accumulation dtype, as there.
        best: int64 [t], the draft's argmax; the first of equals.
    """

    value: Tensor
    acceptance: Tensor
    best: Tensor


class FusedTerms(Protocol):
    """What `weighted_terms` computes, in one kernel."""

    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor | None
    ) -> WeightedTerms: ...


class TileLoss(Protocol):
    """A loss per column. `plain` is the definition, for autograd; calling the object computes the same value
    with its gradient by hand. Tests compare the two.

    Attributes:
        temporaries: how many tensors [t, Vd] of the accumulation dtype the call allocates.
    """

    @property
    def temporaries(self) -> int: ...

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        """Value and gradient on one tile.

        Args:
            logits: [t, Vd], of the accumulation dtype (fp32, or fp64); may be overwritten.
            target: [t, Vd], the teacher's probabilities of each column, which sum to one.
        """

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits, target [t, Vd] -> the loss of each column [t], differentiable by autograd."""

    def fused(self, logits: Tensor) -> FusedTerms | None:
        """The kernel that computes this loss for such logits, where there is one."""


def weighted_terms(
    loss: TileLoss, logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor | None
) -> WeightedTerms:
    """One tile of a loss, with its gradient weighted and rounded to the dtype in which it is multiplied on.

    Args:
        logits: [t, Vd], as the matmul returns them; not read afterwards.
        target: [t, Vd], the teacher's probabilities, of the accumulation dtype.
        weight: [t], of the accumulation dtype.
        gradient: [t, Vd], takes weight * d(value) / d(logits) in the dtype of the head; None where nobody
            asks for it.
    """
    if kernel := loss.fused(logits):
        return kernel(logits, target, weight, gradient)
    # Rebound, so that logits in a half dtype are freed.
    logits = logits.to(target.dtype)
    best = logits.argmax(-1)
    terms = loss(logits, target)
    if gradient is not None:
        torch.mul(terms.dlogits, weight[:, None], out=gradient)
    return WeightedTerms(terms.value, terms.acceptance, best)
