"""Fresh ranks on this machine for each call, on its CPU (gloo) or its GPUs (NCCL).

Fresh, because DeepSpeed keeps module-level state that one case must not hand to the next. On the CPU they are forked from a
server that has torch and DeepSpeed imported already, because importing takes seconds and forking does not; on GPUs they are
spawned, because CUDA does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The last one DeepSpeed imports while it makes an optimizer, and torch's whole compiler with it: seconds for each rank.
PRELOADED = ["benchmarks.exactness_product", "eagle3_ds.train.main", "deepspeed.runtime.zero.muon.original_muon"]


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300.0,
    device: str = "cpu",
    threads: int = 1,
) -> list[Any]:
    """Results by rank of a module-level `function(*args)`, called on every rank of a new world on `cpu` or `cuda`.

    `threads` is how many each rank's torch may use.

    Raises:
        RuntimeError: a rank raised (with its traceback), died, or did not answer in `timeout` seconds.
    """
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(PRELOADED)
    # Read by DeepSpeed and by OpenMP while they are imported, so it must stand before the server or a rank starts.
    os.environ.update(DS_ACCELERATOR=device, OMP_NUM_THREADS="1")
    # One ninja for all that build DeepSpeed's extension: another version would compile it anew.
    beside_python = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != beside_python:
        os.environ["PATH"] = os.pathsep.join((beside_python, os.environ["PATH"]))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = str(Path(folder) / "store")
        connections, processes = [], []
        # After a failure the others may wait for ever in a collective; after success they are about to leave.
        grace = 0.0
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (rank, world_size, store, theirs, device, threads, function, args)
                process = context.Process(target=_rank, args=arguments, daemon=True)
                process.start()
                theirs.close()
                connections.append(ours)
                processes.append(process)
            results = _collect(connections, timeout)
            grace = 10.0
            return results
        finally:
            for process in processes:
                process.join(grace)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"no answer from ranks {sorted(waiting.values())} within {timeout:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(connections)} died without a word") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(connections)} raised\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(connections))]


def _rank(
    rank: int,
    world_size: int,
    store: str,
    connection: Connection,
    device: str,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    # Read by DeepSpeed, which asks for them although the world exists when it is initialised.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    # Without a resolvable host name gloo finds no interface; the ranks are all on this machine anyway.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    try:
        # A file instead of a port: nothing to collide with.
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        answer = (True, function(*args))
    except Exception:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None
    # Plain pickle copies tensors; multiprocessing's own would share them through descriptors that die with this process.
    connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
    # Nothing is left to save, and the interpreter's own farewell to torch takes seconds.
    os._exit(0)
