"""A function of rows, run in forward and once more in backward, a tile of rows at a time: autograd keeps what
goes in, and nothing of what is computed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.draft.tiles import map_tiles

RowFunction = Callable[..., tuple[Tensor, ...]]
"""Row inputs [t, ...], then weights -> outputs [t, ...], row by row."""


def in_tiles(
    function: RowFunction, rows: Sequence[Tensor], weights: Sequence[Tensor], size: int | None
) -> tuple[Tensor, ...]:
    """`function(*rows, *weights)` with autograd.

    Args:
        function: pure, because backward repeats it; each row of what it returns depends on that row alone.
        rows: [n, ...] each; those that need no gradient (angles, for example) get none.
        weights: their gradients are summed over the tiles in fp32 (fp64 for fp64).
        size: rows of a tile; None keeps everything for backward instead, and repeats nothing.

    Returns:
        Tensors [n, ...].
    """
    if size is None:
        return function(*rows, *weights)
    return _InTiles.apply(function, size, len(rows), *rows, *weights)


class _InTiles(torch.autograd.Function):
    """Forward: `function`, tile by tile.
    Backward: repeats it with autograd, tile by tile, and sums the weights' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, size: int, num_rows: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        length = len(tensors[0])
        ctx.function, ctx.num_rows = function, num_rows
        ctx.tiles = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        ctx.save_for_backward(*tensors)
        rows, weights = tensors[:num_rows], tensors[num_rows:]
        return map_tiles(lambda tile: function(*(x[tile] for x in rows), *weights), ctx.tiles)

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors, num_rows = ctx.saved_tensors, ctx.num_rows
        needed = [index for index, asked in enumerate(ctx.needs_input_grad[3:]) if asked]
        totals: dict[int, Tensor] = {
            index: torch.empty_like(tensors[index])
            if index < num_rows
            else torch.zeros_like(
                tensors[index],
                dtype=torch.float64 if tensors[index].dtype == torch.float64 else torch.float32,
            )
            for index in needed
        }
        for tile in ctx.tiles:
            parts = [x[tile] if index < num_rows else x for index, x in enumerate(tensors)]
            leaves = [x.detach().requires_grad_(index in totals) for index, x in enumerate(parts)]
            with torch.enable_grad():
                outputs = ctx.function(*leaves)
            asked = [leaves[index] for index in needed]
            gradients = torch.autograd.grad(outputs, asked, [d[tile] for d in doutputs])
            for index, gradient in zip(needed, gradients, strict=True):
                if index < num_rows:
                    totals[index][tile] = gradient
                else:
                    totals[index].add_(gradient)
        returned = (totals[index].to(x.dtype) if index in totals else None for index, x in enumerate(tensors))
        return None, None, None, *returned
