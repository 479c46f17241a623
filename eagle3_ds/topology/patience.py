"""How long a process group waits before it gives up by itself.

The supervisor's watchdog (`faults.watchdog_seconds`) ends a run that stands still and says which rank is the
cause. torch's own limits know no cause: 10 minutes for NCCL, 30 for gloo. A group that gives up first makes
the watchdog's word void, or blames the rank that waited.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

GRACE_SECONDS = 120.0
"""Beyond the watchdog's limit: it looks now and then, and writes the stacks of a rank before it ends it."""


def outlast_watchdog(watchdog_seconds: float) -> None:
    """Give every process group that this rank is in, DeepSpeed's among them, a limit beyond the watchdog's.
    It counts for what is started from now on. Not collective; call it again after groups were made.
    """
    if not dist.is_initialized():
        return
    limit = timedelta(seconds=watchdog_seconds + GRACE_SECONDS)
    for group in list(distributed_c10d._world.pg_map):
        for device in group._device_types:
            backend = group._get_backend(device)
            # Backends of plug-ins, such as HCCL, need not have it.
            if hasattr(backend, "_set_default_timeout"):
                backend._set_default_timeout(limit)
