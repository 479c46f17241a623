"""What a rank tells its supervisor: once a second where it is, and at the end which exception ended it."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

import torch.distributed as dist
from torch._C import _distributed_c10d

from eagle3_ds.launch.logs import Status

BEAT_SECONDS = 1.0
# torch keeps the record of NCCL's collectives apart from the others'.
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
# What the libraries below say when a peer has gone; torch's own errors are told by their type.
_OF_A_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "HCCL",
)


class Heart:
    """A thread that beats: it writes a `Status` once a second, as long as Python runs at all.

    Without a supervisor (`stream` is None) nothing is written.
    """

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream
        self._place = ("starting", 0)
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def start(self) -> None:
        if self._stream is not None:
            # The supervisor asks by this signal where every thread is, before it ends a rank that hangs.
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            self._thread.start()

    def stop(self) -> None:
        if self._stream is not None:
            self._stopped.set()
            self._thread.join()
            self._stream.close()

    def at(self, phase: str, step: int) -> None:
        """This rank now does `phase`, and has done `step` optimizer steps."""
        self._place = phase, step
        self._say(self._status())

    def report(self, error: BaseException) -> None:
        """Tell of the exception that ends this rank, before the peers notice that it has gone."""
        self._say(
            {
                "error": {
                    "reason": "".join(traceback.format_exception_only(error)).strip(),
                    "traceback": "".join(traceback.format_exception(error)),
                    "follows": _is_of_a_peer(error),
                }
            }
        )

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._say(self._status())

    def _status(self) -> dict[str, Any]:
        phase, step = self._place
        return asdict(Status(phase, step, *last_collective()))

    def _say(self, message: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            with self._writing:
                self._stream.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            # The supervisor has been killed. A rank must not train on unseen, and its peers will notice that
            # it has gone.
            os._exit(1)


@contextmanager
def beating(status_fd: int | None) -> Iterator[Heart]:
    """A heart for the time of training. An exception that leaves the block is told to the supervisor, and
    raised on.
    """
    heart = Heart(None if status_fd is None else os.fdopen(status_fd, "wb", buffering=0))
    heart.start()
    try:
        yield heart
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            heart.report(error)
        raise
    finally:
        heart.stop()


def last_collective() -> tuple[str, bool, int]:
    """The collective that this rank waits for, else the one that it issued last; whether it waits; when it
    was issued, in ns.

    From torch's flight recorder, which records when TORCH_FR_BUFFER_SIZE is set. Without a record: ("",
    False, 0).
    """
    entries = []
    for name in _RECORDERS:
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    if not entries:
        return "", False, 0
    entries.sort(key=lambda entry: entry["time_created_ns"])
    unfinished = [entry for entry in entries if not entry["retired"]]
    entry = unfinished[0] if unfinished else entries[-1]
    sizes = " ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"])
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    group = entry["process_group"][0]
    words = f"{entry['profiling_name']} number {number} of group {group} on {sizes or 'nothing'}"
    return words, bool(unfinished), entry["time_created_ns"]


def _is_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _OF_A_PEER)
