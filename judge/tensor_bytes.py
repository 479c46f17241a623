"""Live and peak bytes of tensor storages: what a process holds in tensors, on any device and without an
allocator's help.

with TensorBytes() as counted:
    counted.add(model.parameters())
    counted.mark()
    step()
print(counted.baseline, counted.above_baseline)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the storages that operators return while it is entered, each once however many tensors share it.

    A storage counts from the operator that returned it until it dies, in forward and in backward, inside of
    custom autograd Functions too. What a kernel allocates and frees within one operator is not seen. A
    storage that was there before is counted from the start as soon as an operator reads it, or at once by
    `add`: it is part of the baseline. A storage made by no operator (`torch.from_numpy`, a communication
    library's buffer) cannot be told from one that was there before, unless the caller says that all of those
    were added.

    One process counts its own storages; on several ranks, each enters a counter of its own.

    Attributes:
        live: bytes alive now.
        peak: largest `live` since the last `mark`.
        baseline: bytes that were alive at the last `mark`, or at the start.
        at_peak: what made up the peak, bytes by "operator dtype shape"; filled only with `explain`, which is
            slow.
    """

    def __init__(
        self, device_type: str | None = None, explain: bool = False, all_added: bool = False
    ) -> None:
        """Count storages on `device_type` ("cpu", "cuda"), or on every device but meta, where nothing is
        held.

        `all_added`: whatever was there before is handed to `add`, so a storage met for the first time is new.
        """
        super().__init__()
        self._all_added = all_added
        self.live = self.peak = self.baseline = 0
        self.at_peak: Counter[str] = Counter()
        self._device_type, self._explain = device_type, explain
        self._alive: dict[int, tuple[int, str]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before, now rather than when an operator first reads them."""
        for tensor in tensors:
            self._hold(tensor, "there before", existed=True)

    def mark(self) -> None:
        """Start anew from what is alive: it becomes the baseline, and the peak counts from here."""
        self.baseline = self.peak = self.live
        self._note_peak()

    @property
    def above_baseline(self) -> int:
        """Peak bytes beyond the baseline."""
        return self.peak - self.baseline

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._hold(leaf, "no operator", existed=not self._all_added)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf, str(func), existed=False)
        return result

    def _hold(self, tensor: Tensor, origin: str, existed: bool) -> None:
        kind = tensor.device.type
        if tensor.layout != torch.strided or kind == "meta" or self._device_type not in (None, kind):
            return
        storage = tensor.untyped_storage()
        # The address of the C++ storage: unique while it lives, and forgotten when it dies.
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (size, f"{origin} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        weakref.finalize(storage, self._release, key).atexit = False
        self.live += size
        if existed:
            # It was alive at the mark and at the peak, unnoticed.
            self.baseline += size
            self.peak += size
        elif self.live > self.peak:
            self.peak = self.live
            self._note_peak()

    def _release(self, key: int) -> None:
        size, _ = self._alive.pop(key)
        self.live -= size

    def _note_peak(self) -> None:
        if self._explain:
            self.at_peak = Counter()
            for size, label in self._alive.values():
                self.at_peak[label] += size
