"""All-gather and reduce-scatter along rows or another dim; shares may be uneven if all ranks know the sizes.

Legend: n ranks of the group, S rows of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.parts import EXCHANGE, marked

# torch 2.13 renamed both and warns about the old names; torch 2.11 has only those.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@marked(EXCHANGE)
def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [S, ...], of the same shape on all ranks -> [n * S, ...] in rank order. Without autograd."""
    if group is None:
        return x
    gathered = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    _all_gather_single(gathered, x.contiguous(), group=group)
    return gathered


@marked(EXCHANGE)
def reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [n * S, ...] of every rank -> [S, ...]: this rank's rows, summed over the ranks. Without autograd.

    Raises:
        ValueError: the number of ranks does not divide the rows.
    """
    if group is None:
        return x
    size, rows = group.size(), x.shape[0]
    if rows % size:
        raise ValueError(
            f"{rows} rows cannot be scattered to {size} ranks. Pad them to a multiple of {size}."
        )
    scattered = x.new_empty((rows // size, *x.shape[1:]))
    _reduce_scatter_single(scattered, x.contiguous(), group=group)
    return scattered


def all_gather_tensor(
    local: Tensor, group: dist.ProcessGroup | None, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """Concatenate every rank's `local` along `dim`, in rank order, without autograd.

    Args:
        local: this rank's share, of any shape; the shares of two ranks differ along `dim` at most.
        group: the ranks.
        dim: along which they are concatenated.
        sizes: the size of each rank's share along `dim`, the same list on all ranks; None when all are equal.
            It is an argument, because exchanging sizes would make the host wait for the device.

    Raises:
        ValueError: `sizes` has not one entry per rank, or another size for this rank than `local`.
    """
    if group is None:
        return local
    rows = local.movedim(dim, 0)
    if sizes is None:
        return all_gather_rows(rows, group).movedim(0, dim)
    _check_sizes(sizes, rows.shape[0], group)
    largest = max(sizes)
    gathered = all_gather_rows(_pad_rows(rows, largest), group)
    shares = [gathered[rank * largest : rank * largest + size] for rank, size in enumerate(sizes)]
    return torch.cat(shares).movedim(0, dim)


class Gather(torch.autograd.Function):
    """Forward: `all_gather_tensor`.
    Backward: reduce-scatter: a rank gets the gradient of its share, summed over all ranks.

    Call it as `apply(group, local, dim, sizes)`. The gradient is that of the sum of all ranks' losses. If
    every rank computes the same loss from the gathered tensor, that is n times the gradient of the loss:
    divide it by n.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup | None,
        local: Tensor,
        dim: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return all_gather_tensor(local, group, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        if ctx.group is None:
            return None, grad, None, None
        rows = grad.movedim(ctx.dim, 0)
        if ctx.sizes is None:
            return None, reduce_scatter_rows(rows, ctx.group).movedim(0, ctx.dim), None, None
        largest = max(ctx.sizes)
        padded = torch.cat([_pad_rows(share, largest) for share in rows.split(list(ctx.sizes))])
        mine = reduce_scatter_rows(padded, ctx.group)[: ctx.sizes[ctx.group.rank()]]
        return None, mine.movedim(0, ctx.dim), None, None


def gather_outputs_and_unpad(
    x: Tensor,
    gather_dim: int,
    group: dist.ProcessGroup | None = None,
    unpad_dim: int | None = None,
    padding: int = 0,
) -> Tensor:
    """Gather every rank's `x` along `gather_dim`, with autograd (see `Gather`), and cut the padding off the
    end.

    Args:
        x: this rank's share, of any shape, the same on all ranks.
        gather_dim: along which the shares are concatenated.
        group: the ranks.
        unpad_dim: the dim that was padded before the sequence was cut; None is `gather_dim`.
        padding: how many entries were added at its end, over all ranks.

    Raises:
        ValueError: `padding` is negative, or larger than the gathered dim.
    """
    gathered: Tensor = Gather.apply(group, x, gather_dim)
    dim = gather_dim if unpad_dim is None else unpad_dim
    size = gathered.shape[dim]
    if not 0 <= padding <= size:
        raise ValueError(
            f"padding is {padding}, but dim {dim} of the gathered tensor has size {size}. Use 0 to {size}."
        )
    return gathered.narrow(dim, 0, size - padding)


def _pad_rows(rows: Tensor, size: int) -> Tensor:
    missing = size - rows.shape[0]
    return torch.cat((rows, rows.new_zeros((missing, *rows.shape[1:])))) if missing else rows


def _check_sizes(sizes: Sequence[int], rows: int, group: dist.ProcessGroup) -> None:
    if len(sizes) != group.size():
        raise ValueError(
            f"sizes {list(sizes)} has {len(sizes)} entries for {group.size()} ranks. Give one per rank."
        )
    if sizes[group.rank()] != rows:
        raise ValueError(
            f"sizes {list(sizes)} says {sizes[group.rank()]} for rank {group.rank()}, whose share has "
            f"{rows}. Give the same list, the true sizes, on every rank."
        )
