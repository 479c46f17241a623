"""Freeing the shared memory that DeepSpeed 0.19.8 leaves on CPU machines: 69 MB per rank and run, until the
machine is restarted.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from eagle3_ds.topology import Topology


def segment(rank: int) -> Path:
    """The file of a rank's buffer, through which DeepSpeed reduces between the ranks of one host
    (`comm/shm.cpp`).
    """
    run = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    return Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{run}_{rank}"


def unname_segment(topology: Topology) -> None:
    """Unlink this rank's buffer, which DeepSpeed never does. Collective; call it after
    `deepspeed.initialize`.

    By then all ranks of the host have mapped it. The kernel frees it when the last of them ends, even by a
    crash.
    """
    if topology.device.type == "cpu" and dist.is_initialized():
        dist.barrier()
        segment(topology.place.rank).unlink(missing_ok=True)
