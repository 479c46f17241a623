"""Starting ranks on this machine, on its CPU (gloo) or its GPUs (NCCL): new ones for each call, or a pool for
many calls.

`run_ranks` starts new ranks, because DeepSpeed keeps module-level state that must not pass from one case to
the next. CPU ranks are forked from a server that has imported torch and DeepSpeed, which takes seconds; GPU
ranks are spawned, because CUDA does not work after a fork. `RankPools` keeps ranks for many calls that leave
no state, such as tests of attention and collectives.

Arguments and results are pickled, so that tensors are copied: a tensor in shared memory is lost when the
process that made it ends.
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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# DeepSpeed imports the last one when it makes an optimizer, and with it torch's compiler: seconds per rank.
PRELOADED = ["judge.product", "eagle3_ds.train.main", "deepspeed.runtime.zero.muon.original_muon"]


CALLS_OF_A_WORLD = 25
"""That ranks of a pool answer. The process groups of a call stay until its ranks end, each with threads that
wake up again and again: after hundreds of calls they took more of the processor than the calls."""


class RankFailure(RuntimeError):  # noqa: N818 - "failure" is what tests call it
    """A rank raised, died or did not answer in time."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300.0,
    device: str = "cpu",
    threads: int = 1,
) -> list[Any]:
    """Results by rank of a module-level `function(*args)`, called on every rank of a new world on `cpu` or
    another kind of device.

    Args:
        threads: how many each rank's torch may use.

    Raises:
        RankFailure: a rank raised (with its traceback), died, or did not answer in `timeout` seconds.
    """
    world = _World(world_size, device, threads)
    grace = 0.0
    try:
        results = world.call(function, args, timeout)
        grace = 10.0
        return results
    finally:
        # After a failure, ranks may wait for ever in a collective; after success they end by themselves.
        world.close(grace)


class RankPools:
    """Worlds of CPU ranks that stay for further calls, one for each size that was asked for."""

    def __init__(self) -> None:
        self._worlds: dict[int, _World] = {}

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0
    ) -> list[Any]:
        """Results of `function(*args)` by rank.

        Raises:
            RankFailure: with the traceback of the first rank that raised, or which ranks died or did not
                answer. The world is started anew for the next call.
        """
        world = self._worlds.get(world_size)
        if world is None:
            world = self._worlds[world_size] = _World(world_size, "cpu", threads=1)
        try:
            results = world.call(function, args, timeout)
        except BaseException:
            # Other ranks may wait for ever in a collective that the failed rank never reached.
            self._worlds.pop(world_size).close(grace=0.0)
            raise
        if world.calls >= CALLS_OF_A_WORLD:
            self._worlds.pop(world_size).close(grace=10.0)
        return results

    def close(self) -> None:
        for world in self._worlds.values():
            world.close(grace=10.0)
        self._worlds.clear()


class _World:
    """Some ranks that have joined one process group and answer calls."""

    def __init__(self, world_size: int, device: str, threads: int) -> None:
        self.calls = 0
        context = _context(device)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, store, theirs, device, threads)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], args: Sequence[Any], timeout: float) -> list[Any]:
        self.calls += 1
        message = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(message)
            except BrokenPipeError:
                raise self._death(rank) from None
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(f"no answer from ranks {sorted(waiting.values())} within {timeout:.0f} s")
            for rank in [waiting.pop(connection) for connection in ready]:
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self._connections))]

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, result = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._death(rank) from None
        if not succeeded:
            raise RankFailure(f"rank {rank} of {len(self._connections)} raised\n{result}")
        return result

    def _death(self, rank: int) -> RankFailure:
        self._processes[rank].join(5)
        return RankFailure(
            f"rank {rank} of {len(self._connections)} died, exit code {self._processes[rank].exitcode}"
        )

    def close(self, grace: float) -> None:
        """End the ranks. Those that have not ended by themselves within `grace` seconds are killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(grace)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _context(device: str) -> Any:
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(PRELOADED)
    # DeepSpeed and OpenMP read these on import: set them before the server or a rank starts.
    os.environ.update(DS_ACCELERATOR=device, OMP_NUM_THREADS="1")
    _own_ninja_first()
    return context


def _serve(rank: int, world_size: int, store: str, connection: Connection, device: str, threads: int) -> None:
    """The main function of a rank: join the process group, then answer calls until the connection closes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    # Read by DeepSpeed, which asks for them although the world exists when it is initialised.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR=device)
    # Without a resolvable host name gloo finds no network interface. All ranks are on this machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    from eagle3_ds.device.kinds import backend_of

    torch.set_num_threads(threads)
    # The rendezvous is a file, because a port could be taken by another process.
    dist.init_process_group(
        backend_of(device), init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_answer(message))
    dist.destroy_process_group()
    # Exit without the interpreter's shutdown, which takes seconds per rank with torch; nothing is unsaved.
    os._exit(0)


def _leave_with_parent() -> None:
    """In a thread, wait for the end of the caller and then end this rank. A rank that waits in a collective
    does not notice that its connection is closed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(message: bytes) -> bytes:
    """Run one call. An exception is returned as text, because not every exception can be pickled."""
    try:
        path, call = pickle.loads(message)
        sys.path[:] = path
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def _own_ninja_first() -> None:
    """Put this environment's ninja first on PATH: another version would rebuild DeepSpeed's extension."""
    beside_python = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != beside_python:
        os.environ["PATH"] = os.pathsep.join((beside_python, os.environ["PATH"]))
