"""The devices of this machine: of which kind they are, how many, and which is this rank's."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from eagle3_ds.device.kinds import CPU, KINDS, VISIBLE, forced_kind


def detect_accelerator() -> str:
    """The kind of this machine's accelerators, a name of `KINDS`. DeepSpeed's environment variable
    DS_ACCELERATOR overrides what torch finds.

    Raises:
        ValueError: DS_ACCELERATOR names another kind, or one that this torch does not know.
    """
    forced = forced_kind()
    if forced is not None:
        if not hasattr(torch, forced):
            raise ValueError(
                f"DS_ACCELERATOR is {forced!r}, but this torch has no devices of this kind. Install "
                f"{KINDS[forced].package}, or unset it."
            )
        return forced
    return next((kind for kind in KINDS if kind != CPU and is_available(kind)), CPU)


def is_available(kind: str) -> bool:
    """Whether torch finds a device of a kind here."""
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def device_module(device: torch.device | str) -> Any:
    """torch's module of the kind of `device`, such as torch.xpu."""
    return getattr(torch, torch.device(device).type)


def device_count(kind: str) -> int:
    """The number of accelerators of this machine; 0 on a CPU, which can run any number of ranks."""
    return 0 if kind == CPU else int(device_module(kind).device_count())


def device_name(kind: str) -> str:
    """What the vendor calls the first device of a kind."""
    return str(device_module(kind).get_device_name(0))


def device_memory(kind: str) -> int:
    """Bytes of memory of the first device of a kind."""
    return int(device_module(kind).get_device_properties(0).total_memory)


def described_devices(kind: str) -> list[tuple[str, str, str]]:
    """(name, description, memory) of each device of an accelerator's kind."""
    module, rows = device_module(kind), []
    for index in range(module.device_count()):
        found = module.get_device_properties(index)
        capability = f", compute capability {found.major}.{found.minor}" if kind == "cuda" else ""
        rows.append((f"{kind}:{index}", found.name + capability, f"{found.total_memory / 2**30:.0f} GiB"))
    return rows


def built_with() -> list[tuple[str, str]]:
    """(name, version) of the vendors' libraries that this torch was built with."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    rows = [
        ("CUDA of torch", torch.version.cuda or "none: this torch is built without CUDA"),
        ("cuDNN of torch", str(cudnn) if cudnn else "none"),
    ]
    others = (("ROCm of torch", torch.version.hip), ("XPU of torch", torch.version.xpu))
    return [*rows, *((name, version) for name, version in others if version)]


def device_index(kind: str, count: int, environ: Mapping[str, str]) -> int:
    """Which of the `count` devices that this rank sees is its own: that of LOCAL_RANK. A scheduler that shows
    each rank its own device alone leaves one, which has index 0 whatever LOCAL_RANK says.

    Two ranks that see the same single device are not told apart from that; their backend refuses the device
    that is in use twice.

    Raises:
        ValueError: there are fewer devices than LOCAL_RANK says.
    """
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    if count == 1:
        return 0
    if local_rank >= count:
        variable = VISIBLE.get(kind, "")
        shown = f" ({variable} is {environ[variable]!r})" if variable in environ else ""
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but this rank sees {count} {kind} device(s){shown}. Each rank "
            "needs one of its own: start fewer ranks on this host, or let each rank see all of "
            "them or its own alone."
        )
    return local_rank


def take_device(kind: str, environ: MutableMapping[str, str] = os.environ) -> torch.device:
    """Make this rank's device the current one, on which collectives and new tensors are put.

    DeepSpeed takes LOCAL_RANK for the device's index, so where both differ the variable is made to say the
    index.

    Raises:
        ValueError: this rank has no device.
    """
    if kind == CPU:
        return torch.device(CPU)
    module = device_module(kind)
    index = device_index(kind, module.device_count(), environ)
    module.set_device(index)
    # DeepSpeed refuses to start where Open MPI's name for it says something else.
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in environ:
            environ[name] = str(index)
    return torch.device(kind, index)
