"""A pool of gloo ranks on this machine: started once per world size, reused by every test of the session.

`run_ranks(world_size, fn, *args)` calls the picklable module-level `fn(*args)` on every rank and returns the results by
rank. A rank that fails, dies or hangs fails the test with its own traceback, and the pool is started anew for the next.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class RankFailure(AssertionError):  # noqa: N818 - pytest shows an assertion without its own frames
    """A rank raised, died or did not answer in time."""


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    """What a rank does: join, then answer calls until the connection closes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        DS_ACCELERATOR="cpu",
    )
    # Without a resolvable host name gloo finds no interface; the ranks are all on this machine anyway.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A file instead of a port: nothing to collide with.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_answer(message))
    dist.destroy_process_group()
    # Nothing is left to save, and the interpreter's own farewell to torch takes seconds per rank.
    os._exit(0)


def _leave_with_parent() -> None:
    """A rank that waits in a collective never sees its connection close: end it when a killed pytest leaves it behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(message: bytes) -> bytes:
    """Run one call. Bytes both ways: tensors are copied, not shared through file descriptors that outlive a test."""
    try:
        path, call = pickle.loads(message)
        sys.path[:] = path
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


class _Pool:
    """The ranks of one world size."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        message = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for connection in self.connections:
            connection.send_bytes(message)
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self.connections)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(f"no answer from ranks {sorted(waiting.values())} within {timeout:.0f} s")
            for connection in ready:
                rank = waiting.pop(connection)
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self.connections))]

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, result = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5)
            raise RankFailure(f"rank {rank} died, exit code {self.processes[rank].exitcode}") from None
        if not succeeded:
            raise RankFailure(f"rank {rank} of {len(self.connections)} raised\n{result}")
        return result

    def close(self, grace: float) -> None:
        """End the ranks: the idle ones leave by themselves within `grace` seconds, the others are killed."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(grace)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class RankPools:
    """The pools of a session, one for each world size that was asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def __call__(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """Results of `fn(*args)` by rank.

        Raises:
            RankFailure: with the traceback of the first rank that raised, or which ranks died or did not answer.
        """
        if world_size not in self._pools:
            self._pools[world_size] = _Pool(world_size)
        try:
            return self._pools[world_size].call(fn, args, timeout)
        except BaseException:
            # The other ranks may wait for ever in a collective that this one never reached.
            self._pools.pop(world_size).close(grace=0.0)
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close(grace=10.0)
        self._pools.clear()
