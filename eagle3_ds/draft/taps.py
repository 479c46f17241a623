"""Taps: the points of the unroll where the loss reads the hidden state of a TTT step and, in backward, adds
its gradient.

The tiled loss computes the gradient of a step's loss already in forward, and only at the columns that are
supervised. It is stored here in that compact form until the backward of the step adds it, so that K dense
gradients [Q, H] never exist at one time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossTaps:
    """The taps of one unroll, one per TTT step.

    Attributes:
        hidden: [Q, H] per step so far, detached; the loss reads and then drops them.
        tickets: a scalar zero per step. The loss takes them as inputs, so that autograd runs the backward of
            the loss before that of any tap (docs/extending.md, "Three scalars that are zero").
        gradients: per step, columns int64 [C] and the gradient [C, H] at them, stored by the loss.
        scale: the gradient of the loss value itself, a scalar; set by the backward of the loss.
    """

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.tickets: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.scale: Tensor | None = None

    def add(self, hidden: Tensor) -> Tensor:
        """Add a tap at a step's output [Q, H]; the next step must read the returned tensor, [Q, H]."""
        self.hidden.append(hidden.detach())
        passed, ticket = _Tap.apply(hidden, self, len(self.tickets))
        self.tickets.append(ticket)
        return passed


class _Tap(torch.autograd.Function):
    """Forward: the identity, and a ticket.
    Backward: dhidden[columns] += scale * gradient, as the loss has stored them for this step.
    """

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
