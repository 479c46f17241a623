"""Counting all torch.distributed calls of this rank, those of DeepSpeed included, by group and kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# {c10d operator: (kind of call, index of the argument with the tensors that this rank sends)}. Point-to-point
# messages are counted by their sender, not by their receiver.
OPERATORS = {
    "alltoall_base_": ("all_to_all", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
UNCOUNTED = ("recv_", "barrier", "monitored_barrier_")
SENT_EVERYWHERE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)
"""What gloo, NCCL and HCCL take in every collective. HCCL reduces no float64, NCCL no bool and no float8."""


@dataclass
class Count:
    """Calls of one kind over one group: their number, the bytes that this rank sent, and the group's size."""

    calls: int = 0
    payload: int = 0
    ranks: int = 1


class CollectiveCalls(TorchDispatchMode):
    """Inside its `with` block, counts this rank's calls, in forward and backward.

    Attributes:
        counts: {(axis, kind): count}; an axis is a key of `groups`, or "world" for any other group.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup | None], everywhere: bool = False) -> None:
        """
        Args:
            groups: those whose calls are counted apart, by axis; None: the axis has no group.
            everywhere: a call that sends a dtype outside `SENT_EVERYWHERE` raises TypeError.
        """
        super().__init__()
        self._everywhere = everywhere
        self.counts: dict[tuple[str, str], Count] = {}
        self._axis = {group.group_name: axis for axis, group in groups.items() if group is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator in UNCOUNTED:
            return
        if operator not in OPERATORS:
            raise NotImplementedError(f"c10d.{operator} is not known here. Add it to OPERATORS.")
        kind, position = OPERATORS[operator]
        group = group_of(args)
        count = self.counts.setdefault(
            (self._axis.get(group.group_name, "world"), kind), Count(ranks=group.size())
        )
        sent = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
        for tensor in sent:
            # A float64 without dimensions is DeepSpeed's norm, which is float32 on devices that need it.
            is_norm = tensor.dtype == torch.float64 and not tensor.dim()
            if self._everywhere and tensor.dtype not in SENT_EVERYWHERE and not is_norm:
                raise TypeError(f"{operator} sends {tensor.dtype}, which not every backend takes.")
        count.calls += 1
        count.payload += sum(tensor.nbytes for tensor in sent)


def group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The group of a c10d operator that is called with `args`."""
    boxed = next(
        arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
    )
    return dist.ProcessGroup.unbox(boxed)
