"""The Ulysses exchange: a rank trades its rows of all heads for all rows of its heads (Jacobs et al., 2023).

Legend: u ranks of the group, S rows of a rank, H heads in all, h = H / u heads of a rank, D head size, B
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PendingRows:
    """An exchange under way: `wait` returns what `sequence_to_heads` would. It keeps the sent buffer alive
    until then.
    """

    def __init__(self, received: Tensor, work: dist.Work | None = None, sent: Tensor | None = None) -> None:
        self._received, self._work, self._sent = received, work, sent

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = self._sent = None
        return self._received


def start_sequence_to_heads(x: Tensor, group: dist.ProcessGroup | None) -> PendingRows:
    """Begin `sequence_to_heads`, so that what does not need its result is computed meanwhile.

    Raises:
        ValueError: the ranks do not divide the heads.
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
    """[S, H, D] -> [u * S, H / u, D]: rank r receives head slice r of everybody's rows, rows in rank order.

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    return start_sequence_to_heads(x, group).wait()


def heads_to_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[u * S, h, D] -> [S, u * h, D]: the inverse of `sequence_to_heads`.

    Raises:
        ValueError: the ranks do not divide the rows.
    """
    return all_heads_to_sequence((x,), group)[0]


def all_sequence_to_heads(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """`sequence_to_heads` of several tensors in one call, [S_i, H_i, D] each, of equal D; rows and heads may
    differ.

    Raises:
        ValueError: the ranks do not divide the heads.
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
    """The inverse of `all_sequence_to_heads`: [u * S_i, h_i, D] -> [S_i, u * h_i, D] each, in one call.

    Raises:
        ValueError: the ranks do not divide the rows.
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


def _exchange_flat(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Row r of each [u, n_i] goes to rank r; what arrives has the same shapes."""
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
    """The exchange on batches, without autograd: scatter one of the dims sequence (1) and heads (2), gather
    the other.

    Scatter 2, gather 1: [B, S, H, D] -> [B, u * S, H / u, D].
    Scatter 1, gather 2: [B, u * S, h, D] -> [B, S, u * h, D], its inverse.

    Raises:
        ValueError: other dims, not four of them, or the ranks do not divide the scattered one.
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
    # The batch travels beside the head's entries, so that rows and heads lead as in the exchange of one
    # sequence.
    x = input.permute(1, 2, 0, 3).flatten(2)
    moved = sequence_to_heads(x, group) if scatter_idx == 2 else heads_to_sequence(x, group)
    return moved.unflatten(2, (batch, dim)).permute(2, 0, 1, 3).contiguous()


class SeqAllToAll4D(torch.autograd.Function):
    """Forward: all_to_all_4D. Backward: all_to_all_4D with the dims exchanged.

    `apply(group, input, scatter_idx, gather_idx)`.
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
