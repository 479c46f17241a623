"""The first matrix of a draft, from the target's hidden states to its own: rows stream from the host through
it.

Legend: S slots of this rank, H hidden size, Ht the target's, n captured layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.layout import LocalRows, row_tiles, stream_rows

Prepare = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""What is done to rows [t, A] before the matrix, with some trained weights: a pure function, run again in
backward.
"""


def stream_aux(
    aux: LocalRows,
    weight: Tensor,
    tile_bytes: int,
    anchor: Tensor | None = None,
    prepare: Prepare | None = None,
    prepare_weights: Sequence[Tensor] = (),
) -> Tensor:
    """The hidden state of step 0: aux rows [S, A] on the host, weight [H, A] -> [S, H] on the weight's
    device.

    The rows stream through tile by tile, in forward and again in backward; the device never holds them all.

    Args:
        aux: this rank's rows, unread.
        weight: of the matrix.
        tile_bytes: what the rows of a tile and of the one behind it may take.
        anchor: a scalar whose gradient is zero, computed when the weight's is.
        prepare: of the rows of a tile, with `prepare_weights`; None leaves them as they are.
    """
    return _StreamAux.apply(aux, tile_bytes, prepare, anchor, weight, *prepare_weights)


class _StreamAux(torch.autograd.Function):
    """Forward: prepare(aux) @ weight.T. Backward: the weights' gradients, summed over the tiles in fp32.

    With x = prepare(aux) [t, A], y = x weight^T and dy the gradient of y: d(weight) = dy^T x, dx = dy weight,
    and the gradients of prepare's weights are autograd's, tile by tile; the rows are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        aux: LocalRows,
        tile_bytes: int,
        prepare: Prepare | None,
        anchor: Tensor | None,
        weight: Tensor,
        *prepare_weights: Tensor,
    ) -> Tensor:
        # A tile on the device and the one behind it; twice as many where it is prepared.
        copies = 2 if prepare is None else 4
        size = max(1, tile_bytes // (copies * weight.shape[1] * max(weight.element_size(), 4)))
        ctx.aux, ctx.tiles, ctx.prepare = aux, row_tiles(len(aux), size), prepare
        # Alone, the matrix's gradient needs its shape only.
        ctx.shape = weight.shape
        ctx.save_for_backward(*([] if prepare is None else [weight, *prepare_weights]))
        hidden = weight.new_empty((len(aux), weight.shape[0]))
        rows = stream_rows(aux, ctx.tiles, weight.device, weight.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            x = part if prepare is None else prepare(part, prepare_weights)
            hidden[tile[0] : tile[-1] + 1] = x @ weight.T
        return hidden

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weight, prepare_weights = saved[0] if saved else None, saved[1:]
        dtype = torch.float64 if dhidden.dtype == torch.float64 else torch.float32
        dweight = dhidden.new_zeros(ctx.shape, dtype=dtype)
        dprepare = [torch.zeros_like(w, dtype=dtype) for w in prepare_weights]
        rows = stream_rows(ctx.aux, ctx.tiles, dhidden.device, dhidden.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            dy = dhidden[tile[0] : tile[-1] + 1]
            if weight is None:
                dweight += dy.T @ part
                continue
            with torch.enable_grad():
                leaves = [w.detach().requires_grad_() for w in prepare_weights]
                x = ctx.prepare(part, leaves)
            dweight += dy.T @ x.detach()
            gradients = torch.autograd.grad(x, leaves, dy @ weight)
            for total, gradient in zip(dprepare, gradients, strict=True):
                total.add_(gradient)
        danchor = dhidden.new_zeros(()) if ctx.needs_input_grad[3] else None
        sums = (total.to(dhidden.dtype) for total in (dweight, *dprepare))
        return None, None, None, danchor, *sums
