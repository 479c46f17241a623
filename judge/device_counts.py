"""What a step would start on a GPU, counted on a machine without one: its tensors are on torch's meta device,
which computes shapes and nothing else.

An operator that is dispatched counts as one launch. Views, allocations and operators whose result is empty
launch nothing. Some operators start several kernels (the flash backward, `index_add`), so a device sees more
events than launches are counted here.

Bytes are those of an operator's tensors, its inputs read once and its outputs written once. Of an embedding
or an index only the rows that are taken are read. Caches are not modelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from eagle3_ds.costs import Traffic
from eagle3_ds.parts import PREFIX
from eagle3_ds.plan import Assumptions, Device
from judge.collective_calls import OPERATORS, UNCOUNTED, group_of

DEVICE = torch.device("meta")
OTHER = "other"
Kind = Literal["matmul", "attention forward", "attention backward", "memory", "host", "exchange"]
PEAKS = Assumptions(matmul=1, attention_forward=1, attention_backward=1, memory=1, link=1, call_seconds=0)
"""Every peak and every bandwidth is reached."""

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm: aten.mm,
    aten.bmm: aten.bmm,
    aten.addmm: aten.addmm,
    aten.addmm_: aten.addmm,
    aten.baddbmm: aten.baddbmm,
}
"""Matrix products, and the operator whose formula torch has."""
_NO_LAUNCH = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
    aten.alias, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.resize_,
}  # fmt: skip
_OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}
_TAKING = {aten.embedding, aten.index, aten.index_select, aten.gather}
_COPIES = {aten.copy_, aten._to_copy}


class Launch(NamedTuple):
    """One operator on the device.

    Attributes:
        part: of the step (eagle3_ds/parts.py).
        operator: its name.
        kind: what limits it.
        flops: floating-point operations of matrix products and attention.
        moved: bytes of device memory read and written.
        linked: bytes from or to the host, or sent to other ranks.
    """

    part: str
    operator: str
    kind: Kind
    flops: int = 0
    moved: int = 0
    linked: int = 0

    def seconds(self, device: Device, assume: Assumptions = PEAKS) -> float:
        """The larger of the time of its operations and the time of its bytes, at the shares of `assume`."""
        if self.kind in ("host", "exchange"):
            bandwidth = device.host_gbs if self.kind == "host" else device.node_gbs
            return self.linked / (1e9 * bandwidth * assume.link)
        share = {
            "matmul": assume.matmul,
            "attention forward": assume.attention_forward,
            "attention backward": assume.attention_backward,
        }.get(self.kind, 1.0)
        arithmetic = self.flops / (1e12 * device.half_tflops * share)
        return max(arithmetic, self.moved / (1e9 * device.memory_gbs * assume.memory))


@dataclass(frozen=True)
class Amount:
    """What some launches come to.

    Attributes:
        launches: how many.
        matmul_flops, attention_flops: of matrix products, and of attention by visible pairs.
        moved_bytes: of device memory read and written, by all launches.
        elementwise_bytes: of these, by launches that are neither a matrix product nor attention.
        host_bytes: copied from or to the host. sent_bytes: to other ranks.
        peak_seconds: every launch at the device's peaks; expected_seconds: at the planner's shares of them.
    """

    launches: int
    matmul_flops: int
    attention_flops: int
    moved_bytes: int
    elementwise_bytes: int
    host_bytes: int
    sent_bytes: int
    peak_seconds: float
    expected_seconds: float


class DeviceCounts(TorchDispatchMode):
    """Counts the launches on the meta device while it is entered, in forward and backward.

    What comes back from the device to the host is zeros.

    Attributes:
        launches: how often each launch happened.
        pairs: query-key pairs that the next call of a flash kernel sees; whoever calls one sets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Launch] = Counter()
        self.pairs = 0
        self._parts = [OTHER]

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """In place of torch.profiler's `record_function` where the product marks its parts."""
        self._parts.append(name.removeprefix(PREFIX))
        try:
            yield
        finally:
            self._parts.pop()

    def add(self, operator: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Count one launch that no operator of torch makes; a tensor read twice is given twice."""
        moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
        self.launches[Launch(self._parts[-1], operator, "memory", moved=moved)] += 1

    def parts(self) -> list[str]:
        """The parts that launched something, in the order in which they first did."""
        return list(dict.fromkeys(launch.part for launch in self.launches))

    def amount(self, device: Device, assume: Assumptions, part: str | None = None) -> Amount:
        """The sum over a part's launches, or over all."""
        chosen = [(one, times) for one, times in self.launches.items() if part in (None, one.part)]

        def total(name: str, *kinds: Kind) -> int:
            return sum(times * getattr(one, name) for one, times in chosen if not kinds or one.kind in kinds)

        return Amount(
            launches=sum(times for _, times in chosen),
            matmul_flops=total("flops", "matmul"),
            attention_flops=total("flops", "attention forward", "attention backward"),
            moved_bytes=total("moved"),
            elementwise_bytes=total("moved", "memory"),
            host_bytes=total("linked", "host"),
            sent_bytes=total("linked", "exchange"),
            peak_seconds=sum(times * one.seconds(device) for one, times in chosen),
            expected_seconds=sum(times * one.seconds(device, assume) for one, times in chosen),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if func is aten.addmm.dtype_out:
            # Only CUDA has this operator; there is none for meta tensors.
            result = kwargs["out"]
        elif func.namespace == "c10d":
            result = _exchanged(func, args)
        elif func is aten._to_copy.default and _leaves(args[0], kwargs):
            result = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        else:
            result = func(*args, **kwargs)
        if any(tensor.device == DEVICE for tensor in (*given, *_tensors(result))):
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace == "c10d":
            self._count_exchange(func, args)
            return
        operator, written = func.overloadpacket, _tensors(result)
        if func.is_view or operator in _NO_LAUNCH or not any(tensor.numel() for tensor in written):
            return
        given = _tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
        host = [tensor for tensor in (*given, *written) if tensor.device != DEVICE and tensor.dim()]
        part, name = self._parts[-1], operator.__name__
        if host:
            assert operator in _COPIES, f"aten.{name} reads {host[0].shape} on the host"
            self.launches[Launch(part, name, "host", linked=host[0].nbytes)] += 1
            return
        if operator is aten.copy_ and _is_same(args[0], args[1]):
            return
        if operator in _OVERWRITING:
            given = given[1:]
        elif operator in _TAKING:
            given = [*given[1:], *written]
        kind, flops = self._arithmetic(operator, args, given, written)
        moved = sum(map(_bytes, given)) + sum(map(_bytes, written))
        self.launches[Launch(part, name, kind, flops, moved)] += 1

    def _arithmetic(
        self, operator: Any, args: Any, given: Sequence[Tensor], written: Sequence[Tensor]
    ) -> tuple[Kind, int]:
        if formula := _PRODUCTS.get(operator):
            factors = [tensor for tensor in args if isinstance(tensor, Tensor)]
            assert factors[-1].dtype.itemsize == 2, f"a product of {factors[-1].dtype} has another peak"
            return "matmul", flop_registry[formula](*factors, out_val=written[0])
        if operator is aten._flash_attention_forward:
            # Two products: scores, output.
            return "attention forward", 2 * 2 * self._take_pairs() * args[0].shape[1] * args[0].shape[2]
        if operator is aten._flash_attention_backward:
            # Five products: scores again, dp, dq, dk, dv.
            return "attention backward", 5 * 2 * self._take_pairs() * args[1].shape[1] * args[1].shape[2]
        return "memory", 0

    def _take_pairs(self) -> int:
        assert self.pairs, "nobody has said what this call sees"
        pairs, self.pairs = self.pairs, 0
        return pairs

    def _count_exchange(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        if name in UNCOUNTED:
            return
        kind, position = OPERATORS[name]
        payload = sum(tensor.nbytes for tensor in _tensors(args[position]))
        sent = round(Traffic("", kind, 1, payload, group_of(args).size()).sent)
        self.launches[Launch(self._parts[-1], name, "exchange", linked=sent)] += 1


def _exchanged(func: Any, args: Any) -> Any:
    """What a collective returns, which never waits: the tensors that it fills, and its work."""
    work = FakeWork().boxed()
    return (args[0], work) if len(func._schema.returns) > 1 else work


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _leaves(tensor: Tensor, kwargs: Any) -> bool:
    """Whether a conversion brings a tensor from the device to the host."""
    to = kwargs.get("device")
    return tensor.device == DEVICE and to is not None and torch.device(to) != DEVICE


def _bytes(tensor: Tensor) -> int:
    """Of the elements that differ: an expanded dim has one."""
    if tensor.device != DEVICE:
        return 0
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _is_same(to: Tensor, source: Tensor) -> bool:
    """Whether a copy changes nothing, as in the second half of `x[rows] += y`. It launches nothing."""
    return (
        to.untyped_storage()._cdata == source.untyped_storage()._cdata
        and to.dtype == source.dtype
        and to.storage_offset() == source.storage_offset()
        and to.shape == source.shape
        and to.stride() == source.stride()
    )
