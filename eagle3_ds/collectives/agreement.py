"""Exchange of small facts that all ranks must agree on, e.g. the largest number of slots.

Every function is collective over all ranks. Without a process group it returns what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def max_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each value over all ranks; `device` is where the collective runs."""
    return _reduced(values, device, dist.ReduceOp.MAX)


def sum_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """The sum of each value over all ranks; `device` is where the collective runs."""
    return _reduced(values, device, dist.ReduceOp.SUM)


def sum_reals_over_ranks(own: Tensor, device: torch.device) -> Tensor:
    """The sum over all ranks of float64 [n] on the host, bitwise equal on all of them.

    Each value travels as two fp32 numbers, its rounding and the rest, because HCCL does not reduce float64
    (Ascend 910B): 48 bits of it, and they are added on the host in the order of the ranks.

    Args:
        own: float64 [n] on the host. device: where the collective runs.
    """
    if not dist.is_initialized():
        return own
    rounded = own.float()
    # What is left of an infinity would be no number.
    rest = torch.where(rounded.isfinite(), own - rounded.double(), 0.0).float()
    sent = torch.stack((rounded, rest)).to(device)
    received = sent.new_empty(dist.get_world_size() * len(sent), len(own))
    dist.all_gather_into_tensor(received, sent)
    return received.cpu().double().unflatten(0, (-1, len(sent))).sum(1).sum(0)


def gather_bytes(row: bytes, device: torch.device) -> list[bytes]:
    """Every rank's `row`, by rank; it must be equally long on all. The bytes travel as numbers in a tensor,
    because `all_gather_object` would unpickle what other ranks send.
    """
    if not dist.is_initialized():
        return [row]
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=torch.int32, device=device)
    rows[dist.get_rank()] = torch.tensor(list(row), dtype=torch.int32)
    dist.all_reduce(rows)
    return [bytes(numbers) for numbers in rows.tolist()]


def _reduced(values: Sequence[int], device: torch.device, operation: dist.ReduceOp.RedOpType) -> list[int]:
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()
