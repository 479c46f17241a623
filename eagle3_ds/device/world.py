"""The process group of all ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from eagle3_ds.device.kinds import KINDS


def join_world(device: torch.device, backend: str | None = None) -> None:
    """Make the process group of all ranks from the launcher's environment. Collective over the world.

    Args:
        device: of this rank.
        backend: of torch.distributed; None picks that of the device's kind.
    """
    chosen = backend or KINDS[device.type].backend
    dist.init_process_group(chosen, **_binding(device, chosen, os.environ))


def _binding(device: torch.device, backend: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The argument that binds a group to its device, where its backend makes use of it: the communicator of
    this group and of each later one is then made at start, where a device or a link that does not work is
    told, and not in the first collective. A single rank has no communicator to make.
    """
    kind = KINDS[device.type]
    if kind.binds_groups and backend == kind.backend and int(environ["WORLD_SIZE"]) > 1:
        return {"device_id": device}
    return {}
