"""Waiting, with an end, for the C++ extensions that DeepSpeed compiles at its first start on a machine.

torch compiles an extension under a lock file and waits for ever for a lock that it finds. A process killed
while it compiles leaves its lock behind, and every later run would stand still at its start without a word.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_S = 900.0
"""Seconds after which nobody is compiling any more: each extension of DeepSpeed takes minutes at most."""
_TOLD_AFTER_S = 5.0


def wait_for_extensions(patience_s: float = PATIENCE_S, poll_s: float = 0.5) -> None:
    """Return once no extension of DeepSpeed's is locked. Each rank calls it before `deepspeed.initialize`.

    Args:
        patience_s: seconds, counted from when a lock was made, after which its owner counts as dead.
        poll_s: seconds between two looks.

    Raises:
        TimeoutError: a lock is older than `patience_s`. It is not removed here, because on a shared home
            folder another host may hold it.
    """
    began, told = time.monotonic(), set[Path]()
    folder = _folder()
    while locks := dict(_locks(folder)):
        waited = time.monotonic() - began
        for lock, made in locks.items():
            if max(time.time() - made, waited) > patience_s:
                raise TimeoutError(
                    f"{lock} says that DeepSpeed's extension {lock.parent.name} is being compiled, and has "
                    f"said so for more than {patience_s:.0f} s: whoever compiled it was killed. "
                    f"Remove that file and start again: rm {lock}"
                )
            if waited > _TOLD_AFTER_S and lock not in told:
                told.add(lock)
                logger.warning(
                    "waiting for another process to compile DeepSpeed's extension %s; "
                    "if there is none, remove %s",
                    lock.parent.name,
                    lock,
                )
        time.sleep(poll_s)


def _locks(folder: Path) -> Iterator[tuple[Path, float]]:
    """The lock files of DeepSpeed's extensions and when each was made, in seconds of the epoch."""
    for name in _names():
        lock = folder / name / "lock"
        try:
            yield lock, lock.stat().st_mtime
        except FileNotFoundError:
            continue


def _names() -> list[str]:
    """The extensions that DeepSpeed has for this accelerator, named as torch names their folders."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return sorted(builder if isinstance(builder, str) else builder.name for builder in ALL_OPS.values())


def _folder() -> Path:
    """Where torch compiles extensions for this Python and this accelerator; torch alone knows the rule."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("deepspeed_not_implemented", verbose=False)).parent
