"""What a step asks of its device: streams, pinned memory, memory in use, random states, waiting.

Each function takes the device, which may be a CPU where it says so; the others are for accelerators.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, supported_activities

from eagle3_ds.device.found import device_module
from eagle3_ds.device.kinds import CPU


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to. A CPU computes in the order of the calls."""
    if device.type != CPU:
        device_module(device).synchronize(device)


def new_stream(device: torch.device) -> Any:
    """A stream beside the one that computes."""
    return device_module(device).Stream(device)


def current_stream(device: torch.device) -> Any:
    """The stream that work is put on now."""
    return device_module(device).current_stream(device)


def on_stream(device: torch.device, stream: Any) -> AbstractContextManager[Any]:
    """Within it, work is put on `stream`."""
    found: AbstractContextManager[Any] = device_module(device).stream(stream)
    return found


def pinned(tensor: Tensor) -> Tensor:
    """A copy in host memory from which a device copies while the host goes on."""
    return tensor.pin_memory()


def empty_pinned_like(tensor: Tensor) -> Tensor:
    """Host memory of a tensor's shape and dtype, to which a device copies while the host goes on.

    Raises:
        RuntimeError: the host cannot pin that much memory.
    """
    return torch.empty_like(tensor, device=CPU, pin_memory=True)


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch holds for later tensors back to the device. A CPU's is never held."""
    if device.type != CPU:
        device_module(device).empty_cache()


def peak_allocated(device: torch.device) -> int:
    """The most bytes of tensors that were on the device at once, since start or `restart_peak`."""
    return int(device_module(device).max_memory_allocated(device))


def restart_peak(device: torch.device) -> None:
    """Let `peak_allocated` count from now on."""
    device_module(device).reset_peak_memory_stats(device)


def random_state(device: torch.device) -> Tensor:
    """The state of the device's generator, uint8 [bytes] on the host."""
    found: Tensor = device_module(device).get_rng_state(device)
    return found


def restore_random_state(state: Tensor, device: torch.device) -> None:
    """Set the device's generator to what `random_state` returned."""
    device_module(device).set_rng_state(state, device)


def profiler_activity(device: torch.device) -> ProfilerActivity | None:
    """What torch's profiler calls the work of this device; None where it sees the host's alone."""
    names = {"cuda": "CUDA", "xpu": "XPU"}
    activity: ProfilerActivity = getattr(ProfilerActivity, names.get(device.type, "PrivateUse1"))
    return activity if device.type != CPU and activity in supported_activities() else None


def keeps_parameters(device: torch.device) -> bool:
    """Whether the parameters of a module stay the same objects when the module is moved from the host to this
    device. torch makes new ones for kinds that come from another package, unless that says otherwise.
    """
    return torch._has_compatible_shallow_copy_type(torch.empty(0), torch.empty(0, device=device))


def adds_in_product(kind: str) -> bool:
    """Whether torch adds a product of half dtypes to an fp32 sum without a temporary on this kind of device.
    torch has it for CUDA, and not for ROCm, whose devices are of the same kind.
    """
    return kind == "cuda" and torch.version.hip is None
