"""The first matrix of a draft, from the target's hidden states to its own: rows stream from the host through
it.

Legend: S slots of this rank, H hidden size, Ht the target's, n captured layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle3_ds.layout import LocalRows, row_tiles, stream_rows


def stream_aux(aux: LocalRows, weight: Tensor, tile_bytes: int, anchor: Tensor | None = None) -> Tensor:
    """The hidden state of step 0: aux rows [S, 3 * Ht] on the host, weight [H, 3 * Ht] -> [S, H] on the
    weight's device.

    The rows stream through tile by tile, in forward and again in backward; the device never holds them all.
    """
    return _StreamAux.apply(aux, tile_bytes, weight, anchor)


class _StreamAux(torch.autograd.Function):
    """Forward: aux @ weight.T. Backward: the weight's gradient, summed over the tiles in fp32."""

    @staticmethod
    def forward(ctx: Any, aux: LocalRows, tile_bytes: int, weight: Tensor, anchor: Tensor | None) -> Tensor:
        # A tile on the device and the one behind it.
        size = max(1, tile_bytes // (2 * weight.shape[1] * max(weight.element_size(), 4)))
        ctx.aux, ctx.tiles, ctx.width = aux, row_tiles(len(aux), size), weight.shape[1]
        hidden = weight.new_empty((len(aux), weight.shape[0]))
        rows = stream_rows(aux, ctx.tiles, weight.device, weight.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            hidden[tile[0] : tile[-1] + 1] = part @ weight.T
        return hidden

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        dtype = torch.float64 if dhidden.dtype == torch.float64 else torch.float32
        dweight = dhidden.new_zeros((dhidden.shape[1], ctx.width), dtype=dtype)
        rows = stream_rows(ctx.aux, ctx.tiles, dhidden.device, dhidden.dtype)
        for tile, part in zip(ctx.tiles, rows, strict=True):
            dweight += dhidden[tile[0] : tile[-1] + 1].T @ part
        return (
            None,
            None,
            dweight.to(dhidden.dtype),
            dhidden.new_zeros(()) if ctx.needs_input_grad[3] else None,
        )
