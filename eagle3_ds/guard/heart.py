"""What a rank sends to its supervisor: once a second a heartbeat with its phase, step and last collective,
and at the end the exception that ended it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

import torch.distributed as dist
from torch._C import _distributed_c10d

from eagle3_ds.launch.logs import Status

BEAT_SECONDS = 1.0
# torch's flight recorder: one record for NCCL's collectives, another for those of other backends.
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
# Parts of the error messages by which gloo, NCCL and HCCL report that a peer has gone. Errors that torch
# raises for it are recognised by their type.
_OF_A_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "HCCL",
)


class Heart:
    """A thread that writes a `Status` to `stream` once a second. It stops beating only when the whole
    interpreter hangs. Without a supervisor (`stream` is None) nothing is written.
    """

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream
        self._place = ("starting", 0)
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def start(self) -> None:
        if self._stream is not None:
            # Before the supervisor kills a rank that hangs, it sends this signal: the stacks of all threads
            # then get into the rank's log.
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            self._thread.start()

    def stop(self) -> None:
        if self._stream is not None:
            self._stopped.set()
            self._thread.join()
            self._stream.close()

    def at(self, phase: str, step: int) -> None:
        """Report that this rank now does `phase` (for example "training"), after `step` optimizer steps."""
        self._place = phase, step
        self._say(self._status())

    def report(self, error: BaseException) -> None:
        """Report the exception that ends this rank. It is sent before the rank closes its connections, so
        that the supervisor hears of it before the peers fail.
        """
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
            # The supervisor was killed: nobody would end this rank or see it fail. Its end makes the peers
            # fail too.
            os._exit(1)


@contextmanager
def beating(status_fd: int | None) -> Iterator[Heart]:
    """Run a heart during the block. An exception that leaves the block is reported and raised again.

    Args:
        status_fd: file descriptor of the pipe to the supervisor; None without a supervisor.
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
    """The first collective that this rank still waits for, or else the last one that it issued.

    torch's flight recorder is read, which needs TORCH_FR_BUFFER_SIZE to be set.

    Returns:
        (its description, whether this rank waits for it, when it was issued in ns); ("", False, 0) without a
        record.
    """
    entries = []
    for name in _RECORDERS:
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    if not entries:
        return "", False, 0
    entries.sort(key=lambda entry: entry["time_created_ns"])
    # torch never retires the sends and receives of a batch (`batch_isend_irecv` under NCCL): the batch has an
    # entry of its own behind them, which it does retire.
    batches = {_point_to_point(entry) for entry in entries if _is_batch(entry)}
    unfinished = [
        entry
        for entry in entries
        if not entry["retired"] and (_is_batch(entry) or _point_to_point(entry) not in batches)
    ]
    entry = unfinished[0] if unfinished else entries[-1]
    sizes = " ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"])
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    group = entry["process_group"][0]
    words = f"{entry['profiling_name']} number {number} of group {group} on {sizes or 'nothing'}"
    return words, bool(unfinished), entry["time_created_ns"]


def _is_batch(entry: Mapping[str, Any]) -> bool:
    return bool(entry["is_p2p"]) and str(entry["profiling_name"]).endswith(":coalesced")


def _point_to_point(entry: Mapping[str, Any]) -> tuple[str, int] | None:
    """Group and number of a send, a receive or a batch of them; None of a collective."""
    return (entry["process_group"][0], entry["p2p_seq_id"]) if entry["is_p2p"] else None


def _is_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _OF_A_PEER)
