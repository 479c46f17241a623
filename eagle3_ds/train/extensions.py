"""Where DeepSpeed's C++ extensions are compiled at its first start on a machine, and how long that may take.

torch compiles an extension under a lock file and waits for ever for a lock that it finds. A process killed
while it compiles leaves its lock behind, and every later run would stand still at its start without a word.
Besides, torch has one folder for all environments of a Python version: two of them, used in turns, compile
anew at each start, because paths of headers are part of what was compiled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed.ops
import torch

logger = logging.getLogger(__name__)

SHARED_MEMORY = "deepspeed_shm_comm"
"""Reduces between the ranks of one host through shared memory."""
VARIABLE = "TORCH_EXTENSIONS_DIR"
PATIENCE_S = 900.0
"""Seconds after which nobody is compiling any more: each extension of DeepSpeed takes minutes at most."""
_TOLD_AFTER_S = 5.0


def prepare_extensions(patience_s: float = PATIENCE_S, poll_s: float = 0.5) -> None:
    """Forbid the extension that training never uses, give this environment a folder for others, and return
    once none in it is locked. Each rank calls it before `deepspeed.initialize`. A folder that the user set
    stays.

    Args:
        patience_s: seconds, counted from when a lock was made, after which its owner counts as dead.
        poll_s: seconds between two looks.

    Raises:
        TimeoutError: a lock is older than `patience_s`. It is not removed here, because on a shared home
            folder another host may hold it.
    """
    began, told = time.monotonic(), set[Path]()
    # DeepSpeed 0.19.8 compiles it for any run on CPUs, for minutes, and maps 69 MB per rank that it never
    # frees. It serves `inference_all_reduce`, which training never calls, and which goes by gloo without it.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    folder = Path(os.environ.setdefault(VARIABLE, str(_own_folder())))
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


def _own_folder() -> Path:
    """This environment's folder, where torch keeps its one for all."""
    from torch.utils.cpp_extension import get_default_build_root

    environment = f"{sys.prefix} {sys.version} {torch.__version__}"
    digest = hashlib.sha256(environment.encode()).hexdigest()[:8]
    return Path(get_default_build_root()) / f"eagle3_ds-{digest}"
