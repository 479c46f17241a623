"""What the loss engine asks of a loss: its value and its gradient on one tile of logits.

Legend: t columns of a tile, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class TileTerms(NamedTuple):
    """Attributes: value: [t], the loss of each column. acceptance: [t], sum over the draft vocabulary of
    min(p, q): the chance that a server which samples accepts the
        guess. p is the teacher's distribution, restricted to the draft vocabulary, q the draft's.
    dlogits: [t, Vd], d(value) / d(logits), unweighted; may share the memory of the logits.
    """

    value: Tensor
    acceptance: Tensor
    dlogits: Tensor


class TileLoss(Protocol):
    """A loss per column. `plain` is the definition, in autograd's hands; the call is the same by hand, in one
    tile.

    Attributes:
        temporaries: tensors [t, Vd] of the accumulation dtype that the call needs beside logits and target.
    """

    @property
    def temporaries(self) -> int: ...

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        """logits [t, Vd] of the accumulation dtype, overwritten; target [t, Vd], columns summing to one."""

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        """[t], differentiable by autograd."""
