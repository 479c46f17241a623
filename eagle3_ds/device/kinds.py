"""The kinds of accelerators, as a table. What is true of one kind alone stands here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

CPU = "cpu"


@dataclass(frozen=True)
class Kind:
    """One kind of accelerator. ROCm's devices are of kind `cuda`, as torch calls them.

    Attributes:
        backend: of torch.distributed.
        visible: the variable by which DeepSpeed gives devices to a rank; None where it gives none. ROCm's
            HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES are left out: DeepSpeed does not set them, so ranks
            inherit them, and the devices that they name are counted from 0.
        binds_groups: whether a process group that is told its device makes its communicators when it is made,
            instead of in the first collective.
        runs_triton: whether this package's Triton kernels were found right there.
        casts_float8: whether torch makes float8 numbers wider there.
        package: what gives torch this kind; None where torch has it built in.
    """

    backend: str
    visible: str | None = None
    binds_groups: bool = False
    runs_triton: bool = False
    casts_float8: bool = False
    package: str | None = None


KINDS: Mapping[str, Kind] = {
    CPU: Kind("gloo", casts_float8=True),
    "cuda": Kind("nccl", "CUDA_VISIBLE_DEVICES", binds_groups=True, runs_triton=True, casts_float8=True),
    "npu": Kind("hccl", "ASCEND_RT_VISIBLE_DEVICES", package="torch_npu"),
    "xpu": Kind("xccl", "ZE_AFFINITY_MASK"),
}

# MPS is of one device: torch has no collectives, streams or peak memory for it, and DeepSpeed no backend.
_REFUSED = {"mps": "torch has no process groups, streams or peak memory for it"}

VISIBLE: Mapping[str, str] = {
    **{name: kind.visible for name, kind in KINDS.items() if kind.visible is not None},
    # Of kinds that DeepSpeed knows and this package does not train on.
    "mlu": "MLU_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "supa": "SUPA_VISIBLE_DEVICES",
}
"""{kind: the variable that names its visible devices}."""


def forced_kind(environ: Mapping[str, str] = os.environ) -> str | None:
    """The kind that DeepSpeed's environment variable DS_ACCELERATOR names; None when it names none.

    Raises:
        ValueError: it names a kind that is not supported.
    """
    forced = environ.get("DS_ACCELERATOR")
    if not forced:
        return None
    if forced not in KINDS:
        why = f" ({_REFUSED[forced]})" if forced in _REFUSED else ""
        raise ValueError(
            f"DS_ACCELERATOR is {forced!r}{why}, but only {', '.join(KINDS)} are supported. Unset it."
        )
    return forced


def backend_of(kind: str) -> str:
    """The backend of torch.distributed for devices of a kind of `KINDS`."""
    return KINDS[kind].backend


def runs_triton(kind: str) -> bool:
    """Whether this package's Triton kernels run on devices of a kind, which need not be in `KINDS`."""
    return kind in KINDS and KINDS[kind].runs_triton


def casts_float8(kind: str) -> bool:
    """Whether torch makes float8 numbers wider on devices of a kind, which need not be in `KINDS`."""
    return kind in KINDS and KINDS[kind].casts_float8
