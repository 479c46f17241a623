"""Host memory for `train.activation: offload`: what the TTT steps need in backward is kept in pinned host
memory, and the copies overlap with the computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3_ds.device.kinds import CPU
from eagle3_ds.device.runtime import current_stream, empty_pinned_like, new_stream, on_stream


class HostStash:
    """A stack of tensors in host memory: put in order, taken in reverse order.

    The copies run on a stream of their own: a step's tensors leave the device while the next step computes
    and, in backward, the tensors of the step before arrive while this step's backward computes. On a CPU
    nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == CPU else new_stream(device)
        self._put: list[tuple[Tensor, ...]] = []
        self._arriving: dict[int, tuple[Tensor, ...]] = {}

    def put(self, tensors: Sequence[Tensor]) -> int:
        """Start to copy tensors, of any shape, to the host; returns the place to `take` them from.

        Raises:
            ValueError: the host cannot pin that much memory.
        """
        kept = tuple(tensors) if self._stream is None else tuple(self._copy_out(tensor) for tensor in tensors)
        self._put.append(kept)
        return len(self._put) - 1

    def take(self, place: int) -> tuple[Tensor, ...]:
        """The tensors of `place`, which must be the last one put, on the device. The stash drops them and
        starts to copy those of the place before.
        """
        assert place == len(self._put) - 1, "taken out of order"
        if self._stream is None:
            return self._put.pop()
        self._fetch(place)
        current_stream(self._device).wait_stream(self._stream)
        tensors = self._arriving.pop(place)
        for tensor in tensors:
            tensor.record_stream(current_stream(self._device))
        self._put.pop()
        self._fetch(place - 1)
        return tensors

    def _copy_out(self, tensor: Tensor) -> Tensor:
        assert self._stream is not None
        try:
            host = empty_pinned_like(tensor)
        except RuntimeError as error:
            held = sum(t.nbytes for tensors in self._put for t in tensors)
            raise ValueError(
                f"train.activation offload: the host cannot pin {tensor.nbytes} bytes more beside {held} "
                f"already pinned ({error}). Raise the limit on locked memory (ulimit -l) or the host's "
                "memory, shorten data.max_length, or use train.activation: recompute."
            ) from error
        self._stream.wait_stream(current_stream(self._device))
        with on_stream(self._device, self._stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not reuse the device memory before the copy has read it.
        tensor.record_stream(self._stream)
        return host

    def _fetch(self, place: int) -> None:
        """Start to copy the tensors of a place to the device, unless that has started."""
        if place < 0 or place in self._arriving:
            return
        with on_stream(self._device, self._stream):
            self._arriving[place] = tuple(
                host.to(self._device, non_blocking=True) for host in self._put[place]
            )
