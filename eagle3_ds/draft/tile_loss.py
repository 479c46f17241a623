"""The interface of a loss: its value and its gradient on one tile of logits.

Legend: t columns of a tile, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

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
