"""What is known about a place before anything starts there: is it this machine, which devices may be used,
which port is free.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

from eagle3_ds.launch.probe import is_free

# The variable by which each accelerator's DeepSpeed says which devices a process sees. ROCm's
# HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES are not here: they renumber beneath, DeepSpeed leaves them
# alone, and so the ranks get what they name.
VISIBLE: Mapping[str, str] = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "mlu": "MLU_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "supa": "SUPA_VISIBLE_DEVICES",
}
# Below the ports that systems give to outgoing connections, so that none of these takes it while states are
# captured.
_PORTS = range(20_000, 30_000)
_TRIES = 100


def visible_devices(accelerator: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The devices that the environment leaves, in its order; None when it says nothing.

    Raises:
        ValueError: devices by another name than their number, or one twice.
    """
    name = VISIBLE.get(accelerator, "")
    text = environ.get(name, "").strip()
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(
            f"{name} is {text!r}, but DeepSpeed's launcher knows devices by their numbers alone. Write "
            f"these, e.g. {name}=0,1, or use --launcher torchrun, which leaves it as it is."
        )
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} is {text!r}, which names a device twice. Name each once.")
    return numbers


def free_port() -> int:
    """A TCP port that nobody listens on now, so that runs on one machine do not meet."""
    for port in random.SystemRandom().sample(_PORTS, _TRIES):
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
