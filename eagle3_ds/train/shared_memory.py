"""What DeepSpeed 0.19.8 leaves behind on CPUs: 69 MB of shared memory per rank and run, for ever."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from eagle3_ds.topology import Topology


def segment(rank: int) -> Path:
    """Where this run's rank has the buffer through which DeepSpeed reduces between ranks of one host
    (`comm/shm.cpp`).
    """
    run = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    return Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{run}_{rank}"


def unname_segment(topology: Topology) -> None:
    """Take the buffer's name away, which DeepSpeed never does. Collective; after `deepspeed.initialize`.

    All ranks have it mapped by then, and keep it until they end, however they end.
    """
    if topology.device.type == "cpu" and dist.is_initialized():
        dist.barrier()
        segment(topology.place.rank).unlink(missing_ok=True)
