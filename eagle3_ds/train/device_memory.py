"""Giving a trainer's device memory back for a while, to the bit.

Tensors stay the objects that they are, views into flat buffers included, because what moves are their
*storages*: the memory behind a tensor and all its views. DeepSpeed's flat buffers, the weights that are views
of them and the optimizer's moments need no knowledge of the ZeRO stage so.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_ds.device.runtime import release_cached_memory


class SleepingMemory:
    """The storages that were taken off a device, with what they held, in host memory.

    Args:
        tensors: of a device; those of other devices and the empty ones are left alone.
        device: whose memory is given back.

    Raises:
        ValueError: a tensor's memory is not its own to give back, for example a file mapped into memory.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._held: list[tuple[torch.UntypedStorage, Tensor]] = []
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == device and storage.nbytes():
                found[storage.data_ptr()] = storage
        fixed = [storage for storage in found.values() if not storage.resizable()]
        if fixed:
            raise ValueError(
                f"{len(fixed)} tensors of {sum(storage.nbytes() for storage in fixed)} bytes lie in memory "
                "that cannot be given back (shared, or a mapped file): copy them before the trainer gets them"
            )
        for storage in found.values():
            self._held.append((storage, _bytes_of(storage).to("cpu", copy=True)))
        for storage in found.values():
            storage.resize_(0)
        gc.collect()
        release_cached_memory(device)

    @property
    def num_bytes(self) -> int:
        """How much device memory was given back."""
        return sum(held.numel() for _, held in self._held)

    def wake(self) -> None:
        """Take the memory again, and fill it with what it held."""
        for storage, held in self._held:
            storage.resize_(held.numel())
            _bytes_of(storage).copy_(held)
        self._held = []


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A view of a storage, uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_of(*roots: Any) -> Iterator[Tensor]:
    """Every tensor that is reached from the roots through modules, containers and the attributes of
    DeepSpeed's and torch's optimizers; parameters with what DeepSpeed hangs on them, and gradients.
    """
    seen: set[int] = set()
    left = list(roots)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            left += [*vars(value).values(), value.grad if value.is_leaf else None]
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | deque):
            left += value
        elif isinstance(value, nn.Module | torch.optim.Optimizer) or _is_deepspeeds(value):
            left += vars(value).values()


def _is_deepspeeds(value: Any) -> bool:
    """Whether a value is an object, not a class or a module, of DeepSpeed or of this package."""
    home = type(value).__module__.partition(".")[0]
    return home in ("deepspeed", "eagle3_ds") and hasattr(value, "__dict__")
