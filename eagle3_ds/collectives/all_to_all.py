"""The Ulysses exchange (Jacobs et al., 2023): a rank gives its rows of all heads for all rows of its heads.

Legend: u ranks of the group, S rows of a rank, H heads in all, h = H / u heads of a rank, D head size, B
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.parts import EXCHANGE, marked


class PendingRows:
    """An exchange under way. It keeps the sent buffer alive until `wait`."""

    def __init__(self, received: Tensor, work: dist.Work | None = None, sent: Tensor | None = None) -> None:
        self._received, self._work, self._sent = received, work, sent

    @marked(EXCHANGE)
    def wait(self) -> Tensor:
        """The result of `sequence_to_heads`, [u * S, H / u, D]."""
        if self._work is not None:
            self._work.wait()
            self._work = self._sent = None
        return self._received


@marked(EXCHANGE)
def start_sequence_to_heads(x: Tensor, group: dist.ProcessGroup | None) -> PendingRows:
    """Begin `sequence_to_heads` of x [S, H, D] and return at once, so that work can overlap with it.

    Raises:
        ValueError: the number of ranks does not divide the heads.
    """
    if group is None:
        return PendingRows(x)
    size, (rows, heads, dim) = group.size(), x.shape
    _check_heads(heads, size)
    by_rank = x.reshape(rows, size, heads // size, dim).transpose(0, 1).contiguous()
    received = torch.empty_like(by_rank)
    work = dist.all_to_all_single(received, by_rank, group=group, async_op=True)
    return PendingRows(received.flatten(0, 1), work, by_rank)


def sequence_to_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [S, H, D] -> [u * S, H / u, D]: rank r receives the r-th slice of heads of all rows, in rank order.

    Raises:
        ValueError: the number of ranks does not divide the heads.
    """
    return start_sequence_to_heads(x, group).wait()


def heads_to_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [u * S, h, D] -> [S, u * h, D]: the inverse of `sequence_to_heads`.

    Raises:
        ValueError: the number of ranks does not divide the rows.
    """
    return all_heads_to_sequence((x,), group)[0]


def all_sequence_to_heads(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """`sequence_to_heads` of several tensors in one collective.

    Args:
        parts: [S_i, H_i, D] each, of one dtype; rows and heads may differ (e.g. q, k and v).
        group: the Ulysses ranks.

    Returns:
        [u * S_i, H_i / u, D] each.

    Raises:
        ValueError: the number of ranks does not divide the heads.
    """
    if group is None:
        return [part.contiguous() for part in parts]
    size = group.size()
    for part in parts:
        _check_heads(part.shape[1], size)
    by_rank = [part.unflatten(1, (size, -1)).transpose(0, 1) for part in parts]
    received = _exchange_flat([part.flatten(1) for part in by_rank], group)
    return [flat.reshape(part.shape).flatten(0, 1) for flat, part in zip(received, by_rank, strict=True)]


def all_heads_to_sequence(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The inverse of `all_sequence_to_heads`: [u * S_i, h_i, D] -> [S_i, u * h_i, D] each, in one collective.

    Raises:
        ValueError: the number of ranks does not divide the rows.
    """
    if group is None:
        return list(parts)
    size = group.size()
    for rows in (part.shape[0] for part in parts):
        if rows % size:
            raise ValueError(
                f"{rows} rows cannot be shared by {size} ranks. Pad them to a multiple of {size}."
            )
    by_rank = [part.unflatten(0, (size, -1)) for part in parts]
    received = _exchange_flat([part.flatten(1) for part in by_rank], group)
    return [
        flat.reshape(part.shape).transpose(0, 1).flatten(1, 2)
        for flat, part in zip(received, by_rank, strict=True)
    ]


@marked(EXCHANGE)
def _exchange_flat(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """One all-to-all of parts [u, n_i]: row r of each goes to rank r. Row r of a result, of the same shape,
    comes from rank r.
    """
    sent = torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0].contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return list(received.split([part.shape[1] for part in parts], dim=1))


def _check_heads(heads: int, size: int) -> None:
    if heads % size:
        raise ValueError(
            f"{heads} heads cannot be shared by {size} ranks. Use a ulysses degree that divides {heads}."
        )


def all_to_all_4D(  # noqa: N802 - the name RFC 338 uses
    input: Tensor, scatter_idx: int = 2, gather_idx: int = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The exchange of a batch, without autograd: scatter one of the dims sequence (1) and heads (2), and
    gather the other.

    Args:
        input: [B, S, H, D] for scatter 2, gather 1; [B, u * S, h, D] for the inverse, scatter 1, gather 2.
        scatter_idx, gather_idx: 2, 1 or 1, 2.
        group: the Ulysses ranks.

    Returns:
        [B, u * S, H / u, D], or [B, S, u * h, D] for the inverse.

    Raises:
        ValueError: the input has not four dims, the indices are others, or the number of ranks does not
            divide the scattered dim.
    """
    if input.dim() != 4:
        raise ValueError(
            f"all_to_all_4D takes [batch, sequence, heads, dim], and the input is {tuple(input.shape)}."
        )
    if (scatter_idx, gather_idx) not in ((2, 1), (1, 2)):
        raise ValueError(
            f"scatter_idx {scatter_idx}, gather_idx {gather_idx}: use 2, 1 (scatter heads) or 1, 2 (scatter "
            "rows)."
        )
    if group is None:
        return input
    batch, dim = input.shape[0], input.shape[3]
    # [B, S, H, D] -> [S, H, B * D]: the batch becomes part of the last dim, because the exchange of one
    # sequence takes three dims.
    x = input.permute(1, 2, 0, 3).flatten(2)
    moved = sequence_to_heads(x, group) if scatter_idx == 2 else heads_to_sequence(x, group)
    return moved.unflatten(2, (batch, dim)).permute(2, 0, 1, 3).contiguous()


class SeqAllToAll4D(torch.autograd.Function):
    """Forward: `all_to_all_4D`.
    Backward: `all_to_all_4D` with scatter_idx and gather_idx exchanged, the inverse permutation.

    Call it as `apply(group, input, scatter_idx, gather_idx)`.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup | None, input: Tensor, scatter_idx: int = 2, gather_idx: int = 1
    ) -> Tensor:
        ctx.group, ctx.scatter_idx, ctx.gather_idx = group, scatter_idx, gather_idx
        return all_to_all_4D(input, scatter_idx, gather_idx, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        return None, all_to_all_4D(grad, ctx.gather_idx, ctx.scatter_idx, ctx.group), None, None
