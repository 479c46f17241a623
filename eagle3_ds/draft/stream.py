"""The first matrix of a draft (EAGLE-3's `fc`), from the target's captured hidden states to the draft's own.
Its input streams from the host, a tile of rows at a time.

Legend: S slots of this rank, H hidden size, A entries of a slot's captured hidden states, t rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.device.kinds import CPU
from eagle3_ds.draft.decoder_backward import accumulate_product
from eagle3_ds.layout import LocalRows, row_tiles, stream_rows

ARRIVING_BYTES = 2**26
"""The most bytes of a tile that is copied to an accelerator, which waits for the first one of them."""
Prepare = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Applied to rows [t, A] before the matrix, with a list of trained weights -> [t, A]. A pure function,
because backward runs it again.
"""


def stream_aux(
    aux: LocalRows,
    weight: Tensor,
    tile_bytes: int,
    anchor: Tensor | None = None,
    prepare: Prepare | None = None,
    prepare_weights: Sequence[Tensor] = (),
    trained: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The hidden state of step 0: aux rows [S, A] on the host, weight [H, A] -> [S, H] on its device, and
    that of the `trained` rows, [n, H].

    The rows stream through the device in forward and again in backward, so it never holds all of them.

    Args:
        aux: this rank's rows, not read yet.
        weight: of the matrix.
        tile_bytes: the most bytes of a tile and of the next one together.
        anchor: a scalar zero, whose gradient arrives with that of the weight (docs/extending.md, "Three
            scalars that are zero").
        prepare: applied to the rows of a tile; None leaves them as they are.
        prepare_weights: the trained weights that `prepare` takes.
        trained: rows [n, A] on the weight's device that get a gradient; None for none, n is 0 then. They are
            in the same pass, because the anchor's gradient must be later than theirs.
    """
    rows = weight.new_empty((0, weight.shape[1])) if trained is None else trained
    return _StreamAux.apply(aux, tile_bytes, prepare, anchor, rows, weight, *prepare_weights)


class _StreamAux(torch.autograd.Function):
    """Forward: prepare(aux) @ weight.T, and prepare(trained) @ weight.T.
    Backward: the weights' gradients, summed over the tiles in fp32.

    With x = prepare(aux) and y = x weight^T: d(weight) = sum_tiles dy^T x, dx = dy weight. From dx autograd
    computes the gradients of prepare's weights, tile by tile. The rows are constants and get no gradient; the
    trained ones do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        aux: LocalRows,
        tile_bytes: int,
        prepare: Prepare | None,
        anchor: Tensor | None,
        trained: Tensor,
        weight: Tensor,
        *prepare_weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # The device holds a tile and the next one; `prepare` makes another tensor of each.
        copies = 2 if prepare is None else 4
        size = tile_bytes // (copies * weight.shape[1] * max(weight.element_size(), 4))
        if weight.device.type != CPU:
            size = min(size, ARRIVING_BYTES // (weight.shape[1] * weight.element_size()))
        ctx.aux, ctx.tiles, ctx.prepare = aux, row_tiles(len(aux), max(1, size)), prepare
        # Without `prepare` and trained rows no dx is needed, and d(weight) needs the weight's shape only.
        ctx.shape = weight.shape
        needed = prepare is not None or len(trained)
        ctx.save_for_backward(*([trained, weight, *prepare_weights] if needed else []))
        hidden = weight.new_empty((len(aux), weight.shape[0]))
        rows = stream_rows(aux, ctx.tiles, weight.device, weight.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            x = part if prepare is None else prepare(part, prepare_weights)
            hidden[tile[0] : tile[-1] + 1] = x @ weight.T
        x = prepare(trained, prepare_weights) if prepare is not None and len(trained) else trained
        return hidden, x @ weight.T

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor, dprojected: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Any] = ctx.saved_tensors or (None, None)
        trained, weight, *prepare_weights = saved
        dtype = torch.float64 if dhidden.dtype == torch.float64 else torch.float32
        dweight = dhidden.new_zeros(ctx.shape, dtype=dtype)
        dprepare = [torch.zeros_like(w, dtype=dtype) for w in prepare_weights]
        rows = stream_rows(ctx.aux, ctx.tiles, dhidden.device, dhidden.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            dy = dhidden[tile[0] : tile[-1] + 1]
            if ctx.prepare is None:
                accumulate_product(dweight, dy.T, part)
                continue
            _prepared_backward(ctx.prepare, part, prepare_weights, dy, weight, dweight, dprepare)
        dtrained = None
        if trained is not None and len(trained):
            leaf, prepare = trained.detach().requires_grad_(), ctx.prepare or _unchanged
            dtrained = _prepared_backward(
                prepare, leaf, prepare_weights, dprojected, weight, dweight, dprepare
            )
        danchor = dhidden.new_zeros(()) if ctx.needs_input_grad[3] else None
        sums = (total.to(dhidden.dtype) for total in (dweight, *dprepare))
        return None, None, None, danchor, dtrained, *sums


def _unchanged(rows: Tensor, _weights: Sequence[Tensor]) -> Tensor:
    return rows


def _prepared_backward(
    prepare: Prepare,
    rows: Tensor,
    prepare_weights: Sequence[Tensor],
    dy: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dprepare: Sequence[Tensor],
) -> Tensor | None:
    """Backward of prepare(rows) @ weight.T for dy [t, H]: adds to dweight [H, A] and to the gradients of
    prepare's weights; returns that of the rows [t, A] if they require one.
    """
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in prepare_weights]
        x = prepare(rows, leaves)
    accumulate_product(dweight, dy.T, x.detach())
    asked = [*leaves, rows] if rows.requires_grad else leaves
    gradients = torch.autograd.grad(x, asked, dy @ weight)
    for total, gradient in zip(dprepare, gradients, strict=False):
        total.add_(gradient)
    return gradients[-1] if rows.requires_grad else None
