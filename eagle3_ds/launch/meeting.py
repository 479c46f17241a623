"""The program by which one rank per host tries an all-reduce, over the backend and the network that training
uses. Its text is sent through ssh.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist

from eagle3_ds.device.found import detect_accelerator, take_device
from eagle3_ds.device.kinds import backend_of


def meet(address: str, port: int, rank: int, ranks: int, seconds: float) -> None:
    """Meet the other ranks at rank 0's address, sum a number of each, and print what came of it as JSON.

    It prints the `backend`, whether rank 0 was `reached`, `why` there is no right sum (empty if there is),
    and the `seconds` that a second sum took, for which all connections are made.

    Args:
        seconds: how long rank 0 is tried to be reached; the whole takes at most twice as long.
    """
    said: dict[str, Any] = {"backend": "", "reached": False, "why": "", "seconds": 0.0}
    # Not every backend's own time limit raises an error: NCCL's ends the process.
    limit = Timer(2 * seconds, _give_up, [said, 2 * seconds])
    limit.daemon = True
    limit.start()
    try:
        kind = detect_accelerator()
        said["backend"] = backend_of(kind)
        device = take_device(kind)
        store = dist.TCPStore(
            address, port, ranks, rank == 0, timedelta(seconds=seconds), wait_for_workers=False
        )
        said["reached"] = True
        dist.init_process_group(said["backend"], store=store, rank=rank, world_size=ranks)
        total = _sum_of(rank + 1, device)
        if total != ranks * (ranks + 1) / 2:
            said["why"] = f"the sum of 1 to {ranks} is {total:g}"
        began = time.monotonic()
        _sum_of(rank + 1, device)
        said["seconds"] = time.monotonic() - began
        dist.destroy_process_group()
    except Exception as error:
        said["why"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    limit.cancel()
    print(json.dumps(said), flush=True)


def _sum_of(value: float, device: torch.device) -> float:
    """The sum over the ranks of a number of each."""
    tensor = torch.tensor([float(value)], device=device)
    dist.all_reduce(tensor)
    return float(tensor.item())


def _give_up(said: dict[str, Any], seconds: float) -> None:
    print(json.dumps({**said, "why": f"no end within {seconds:.0f} s"}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    meet(**json.loads(sys.argv[1]))
