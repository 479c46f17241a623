"""Describing this machine: its packages, its devices, and which attention kernels compute correctly here."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import NamedTuple

import torch

from eagle3_ds.device.found import built_with, described_devices
from eagle3_ds.kernels import KERNELS, AttentionKernel, select_kernel
from eagle3_ds.kernels.selfcheck import TOLERANCE, measured_error
from eagle3_ds.train.trackers import PACKAGES as TRACKERS

PACKAGES = (
    "torch", "deepspeed", "transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", *TRACKERS,
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)


class CheckedKernel(NamedTuple):
    """Which dtypes an attention kernel runs with on this machine, and how exactly.

    Attributes:
        name: name of the kernel.
        results: for each dtype of `DTYPES`, the error of a small case, or `no`.
        why_not: why it does not run here; empty when it does.
        failures: errors of a kernel that claims to run here.
    """

    name: str
    results: list[str]
    why_not: str
    failures: list[str]


def versions() -> list[tuple[str, str]]:
    """(name, version) of Python, of the packages that this project uses, and of what torch was built with."""
    return [
        ("python", platform.python_version()),
        *((package, _version(package)) for package in PACKAGES),
        *built_with(),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices(device: torch.device) -> list[tuple[str, str, str]]:
    """(name, description, memory) of each device of this kind."""
    if device.type == "cpu":
        cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        return [("cpu", f"{cpu}, {torch.get_num_threads()} threads", "")]
    return described_devices(device.type)


def check_kernels(device: torch.device, head_dim: int) -> list[CheckedKernel]:
    """Compare every kernel that claims to run on this device with the reference, on a small case.

    Raises:
        ValueError: `head_dim` is no possible head size.
    """
    if head_dim < 1:
        raise ValueError(
            f"--head-dim is {head_dim}; it is the size of one attention head, 1 or more, e.g. --head-dim 128"
        )
    automatic = {dtype: select_kernel("auto", device, dtype, head_dim) for dtype in DTYPES}
    return [_checked(kernel, device, head_dim, automatic) for kernel in KERNELS]


def _checked(
    kernel: AttentionKernel,
    device: torch.device,
    head_dim: int,
    automatic: dict[torch.dtype, AttentionKernel],
) -> CheckedKernel:
    results, reasons, failures = [], {}, []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        reason = kernel.unavailable_reason(device, dtype, head_dim)
        if reason is not None:
            reasons[name] = reason
            results.append("no")
            continue
        result = _check(kernel, device, dtype, head_dim)
        if not result.startswith("error"):
            failures.append(f"{kernel.name} in {name}: {result}")
        results.append(result + (", auto" if automatic[dtype] is kernel else ""))
    same = len(reasons) == len(DTYPES) and len(set(reasons.values())) == 1
    lines = list(reasons.values())[:1] if same else [f"{name}: {why}" for name, why in reasons.items()]
    return CheckedKernel(kernel.name, results, "; ".join(lines), failures)


def _check(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    try:
        error = measured_error(kernel, device, dtype, head_dim)
    except Exception as problem:
        return f"fails: {type(problem).__name__}: {problem}"
    return (
        f"error {error:.0e}"
        if error <= TOLERANCE[dtype]
        else f"wrong by {error:.0e}, over {TOLERANCE[dtype]:.0e}"
    )
