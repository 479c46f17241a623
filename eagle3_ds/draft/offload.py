"""Where the `offload` mode keeps what the TTT steps need in backward: pinned host memory, copied beside the
computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostStash:
    """Tensors put away in order and taken back in the reverse order.

    On a device with streams the copies run on one of their own, both ways: a step's tensors leave while the
    next step computes, and those of the step before arrive while this one's backward runs. On a CPU the
    tensors are in host memory already, and stay where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream = None if self._streams is None else self._streams.Stream(device)
        self._put: list[tuple[Tensor, ...]] = []
        self._arriving: dict[int, tuple[Tensor, ...]] = {}

    def put(self, tensors: Sequence[Tensor]) -> int:
        """Put tensors away; returns the place to take them from.

        Raises:
            ValueError: the host cannot pin that much memory.
        """
        kept = tuple(tensors) if self._stream is None else tuple(self._copy_out(tensor) for tensor in tensors)
        self._put.append(kept)
        return len(self._put) - 1

    def take(self, place: int) -> tuple[Tensor, ...]:
        """The tensors put at `place`, on the device; the stash forgets them, and begins to bring back those
        before.
        """
        assert place == len(self._put) - 1, "taken out of order"
        if self._streams is None:
            return self._put.pop()
        self._fetch(place)
        self._streams.current_stream(self._device).wait_stream(self._stream)
        tensors = self._arriving.pop(place)
        for tensor in tensors:
            tensor.record_stream(self._streams.current_stream(self._device))
        self._put.pop()
        self._fetch(place - 1)
        return tensors

    def _copy_out(self, tensor: Tensor) -> Tensor:
        assert self._streams is not None and self._stream is not None
        try:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:
            held = sum(t.nbytes for tensors in self._put for t in tensors)
            raise ValueError(
                f"train.activation offload: the host cannot pin {tensor.nbytes} bytes more beside {held} "
                f"already pinned ({error}). Raise the limit on locked memory (ulimit -l) or the host's "
                "memory, shorten data.max_length, or use train.activation: recompute."
            ) from error
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        # The device may reuse the memory only when the copy is done.
        tensor.record_stream(self._stream)
        return host

    def _fetch(self, place: int) -> None:
        """Begin to copy the tensors of a place back, unless that has begun."""
        if place < 0 or place in self._arriving:
            return
        assert self._streams is not None
        with self._streams.stream(self._stream):
            self._arriving[place] = tuple(
                host.to(self._device, non_blocking=True) for host in self._put[place]
            )
