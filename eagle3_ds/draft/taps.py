"""Where the loss touches the unroll: it reads each TTT step's hidden state and, in backward, adds its
gradient there.

The gradient of a step's loss is known as soon as its logits are, in the forward pass, and only at the columns
that count. It waits here, compact, until backward comes by: K dense gradients never exist at one time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossTaps:
    """The steps' outputs as the loss sees them.

    Attributes:
        hidden: one [Q, H] per step so far, outside autograd; the loss reads them and lets them go.
        tickets: one scalar per step, that tie the taps to the loss in the autograd graph.
        gradients: columns int64 [C] and gradient [C, H] per step, left by the loss.
        scale: the gradient that arrived at the loss; set when its backward runs, before any tap's.
    """

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.tickets: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.scale: Tensor | None = None

    def add(self, hidden: Tensor) -> Tensor:
        """Tap a step's output [Q, H]; returns it for the next step."""
        self.hidden.append(hidden.detach())
        passed, ticket = _Tap.apply(hidden, self, len(self.tickets))
        self.tickets.append(ticket)
        return passed


class _Tap(torch.autograd.Function):
    """Forward: identity. Backward: adds the gradient that the loss left for this step."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, taps: LossTaps, step: int) -> tuple[Tensor, Tensor]:
        ctx.taps, ctx.step = taps, step
        return hidden.view_as(hidden), hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor, _dticket: Tensor) -> tuple[Tensor, None, None]:
        taps: LossTaps = ctx.taps
        assert taps.scale is not None, "a tap's backward ran before the loss's"
        columns, gradient = taps.gradients[ctx.step]
        added = dhidden.index_add(0, columns, gradient * taps.scale.to(gradient.dtype))
        taps.gradients[ctx.step] = (columns, gradient.new_empty(0))
        return added, None, None
