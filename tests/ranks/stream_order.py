"""Whether work of one stream can be overtaken by work of another: a judge of the order that streams, events
and the host's waiting leave open, for a device whose streams are in Python (pretend_accelerator.py).

A device does the work of one stream in order, and of different streams in any order that no wait forbids.
Every stream, and the host, has a clock of its own and knows how far it has waited for the others' (vector
clocks: Mattern, "Virtual time and global states of distributed systems", 1989). Work on a tensor is in order
when the stream that it is put on knows of the last write to the tensor's memory and, if it writes, of every
read since. torch's rules for memory are judged beside it:

- Memory that is allocated on a stream may have been another tensor's, so its first use elsewhere waits for
  what that stream was given before.
- When a tensor is freed its memory goes back to the stream that it was allocated on, which must have waited
  for what other streams do with it, unless these were recorded (`record_stream`).
- A piece of memory is judged whole, so parts of one tensor count as one.
- A copy that does not block reads or writes host memory later. torch keeps pinned memory until then; what the
  host itself reads or writes there is judged like work of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KIND = "pretend"
HOST = -1
"""The host's number among the streams."""
Clock = dict[int, int]
aten = torch.ops.aten
_COPIES = {aten._to_copy, aten.copy_}


@dataclass
class Memory:
    """What was done with one piece of memory.

    Attributes:
        owner: the stream that it was allocated on.
        written: who wrote it last, when, and by what.
        read: since then, who read it last and when, and by what.
        recorded: streams that torch waits for before it uses the memory again.
    """

    owner: int
    written: tuple[int, int, str]
    read: dict[int, tuple[int, str]] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Order(TorchDispatchMode):
    """Judges the work that is put on the device while it is entered, in forward and backward.

    Attributes:
        faults: what can be overtaken, in words, each once.
        crossed: uses of memory that another stream, or the host, had last written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, None] = {}
        self.crossed = 0
        self._clocks: dict[int, Clock] = {}
        self._memory: dict[int, Memory] = {}
        self._host: dict[int, tuple[Any, Memory]] = {}
        _device().freed()

    def clock(self, stream: int) -> Clock:
        return self._clocks.setdefault(stream, {stream: 0})

    def wait(self, stream: int, known: Clock) -> None:
        """`stream` waits for all that `known` tells of."""
        self._take_back()
        own = self.clock(stream)
        for other, time in known.items():
            own[other] = max(own.get(other, 0), time)

    def synchronize(self) -> None:
        """The host waits for everything."""
        for stream in list(self._clocks):
            self.wait(HOST, self.clock(stream))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._take_back()
        if func is aten.record_stream.default:
            self._of_device(args[0]).recorded.add(args[1].stream_id)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view:
            self._judge(func, args, kwargs, result)
        return result

    def _judge(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.overloadpacket.__name__
        read, written = _read_and_written(func, args, kwargs)
        known = {id(tensor) for tensor in (*read, *written)}
        made = [tensor for tensor in _tensors(result) if id(tensor) not in known]
        everything = [tensor for tensor in (*read, *written, *made) if tensor.numel()]
        if not any(map(_on_device, everything)):
            self._use(HOST, name, read, written)
            return
        stream = CURRENT[-1].stream_id
        self.wait(stream, self.clock(HOST))
        if name.startswith(("empty", "new_empty")):
            for tensor in filter(Tensor.numel, made):
                self._of_device(tensor)
            return
        self._use(stream, name, read, [*written, *made])
        later = func.overloadpacket in _COPIES and (kwargs.get("non_blocking") or args[2:] == (True,))
        if not later and not all(map(_on_device, everything)):
            self.wait(HOST, self.clock(stream))
        if name == "_local_scalar_dense":
            self.wait(HOST, self.clock(stream))

    def _use(self, stream: int, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        clock = self.clock(stream)
        clock[stream] += 1
        for tensor in (*read, *written):
            memory = self._memory_of(tensor, stream)
            if memory is None:
                continue
            writes = any(tensor is other for other in written)
            self._order(stream, name, *memory.written)
            if writes:
                for other, (time, by) in memory.read.items():
                    self._order(stream, name, other, time, by)
                memory.written, memory.read = (stream, clock[stream], name), {}
            else:
                memory.read[stream] = (clock[stream], name)

    def _order(self, stream: int, name: str, other: int, time: int, by: str) -> None:
        if other == stream:
            return
        self.crossed += 1
        if self.clock(stream).get(other, 0) < time:
            self.faults[f"{name} of stream {stream} does not wait for {by} of stream {other}"] = None

    def _memory_of(self, tensor: Tensor, stream: int) -> Memory | None:
        """None for memory of the host that the device has not used."""
        if not tensor.numel():
            return None
        if _on_device(tensor):
            return self._of_device(tensor)
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._host:
            if stream == HOST:
                return None
            # Kept, so that nothing else comes to lie there.
            self._host[address] = (storage, Memory(HOST, (HOST, self.clock(HOST)[HOST], "what stood there")))
        return self._host[address][1]

    def _of_device(self, tensor: Tensor) -> Memory:
        number = _device().number(tensor.untyped_storage().data_ptr())
        if number not in self._memory:
            owner = CURRENT[-1].stream_id
            before = (owner, self.clock(owner)[owner], "what had this memory before")
            self._memory[number] = Memory(owner, before)
        return self._memory[number]

    def _take_back(self) -> None:
        for number in _device().freed():
            memory = self._memory.pop(number, None)
            if memory is None:
                continue
            known = self.clock(memory.owner)
            uses = [memory.written, *((of, time, by) for of, (time, by) in memory.read.items())]
            for other, time, by in uses:
                if other not in memory.recorded and known.get(other, 0) < time:
                    told = f"memory of stream {memory.owner} is freed while {by} of stream {other} may use it"
                    self.faults[told] = None


class Event:
    """How far a stream had come when it was recorded."""

    def __init__(self, clock: Clock) -> None:
        self.clock = dict(clock)


class Stream(torch.Stream):
    """A stream whose waits the judge sees, where there is one."""

    def wait_stream(self, stream: torch.Stream) -> None:
        if JUDGE:
            JUDGE[-1].wait(self.stream_id, JUDGE[-1].clock(stream.stream_id))

    def record_event(self, event: Any = None) -> Any:
        return Event(JUDGE[-1].clock(self.stream_id) if JUDGE else {})

    def wait_event(self, event: Any) -> None:
        if JUDGE:
            JUDGE[-1].wait(self.stream_id, event.clock)


CURRENT: list[Any] = []
"""The stream that work is put on is the last one; the first one is the device's own."""
JUDGE: list[Order] = []


def synchronize() -> None:
    """The host waits for the device."""
    for judge in JUDGE:
        judge.synchronize()


@contextmanager
def put_on(stream: torch.Stream) -> Iterator[None]:
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


@contextmanager
def judged(order: Order) -> Iterator[Order]:
    """Within it, `order` sees all that is put on the device."""
    JUDGE.append(order)
    try:
        with order:
            yield order
    finally:
        JUDGE.pop()


def _read_and_written(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    read: list[Tensor] = []
    written: list[Tensor] = []
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    for argument in arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).extend(_tensors(given.get(argument.name)))
    return read, written


def _device() -> Any:
    """torch's module of the device, which numbers its pieces of memory and knows which were freed."""
    return torch.get_device_module(KIND)


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == KIND


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
