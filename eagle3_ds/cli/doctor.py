"""`eagle3-ds doctor`: what this machine has, and which attention kernels run here, each checked on a small
case.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from eagle3_ds.kernels import KERNELS, AttentionKernel, select_kernel
from eagle3_ds.kernels.selfcheck import TOLERANCE, measured_error
from eagle3_ds.launch.command import read_hostfile
from eagle3_ds.launch.hosts import reach
from eagle3_ds.topology import detect_accelerator

_PACKAGES = ("torch", "deepspeed", "transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")
_DTYPES = (torch.bfloat16, torch.float32)


def run(arguments: Sequence[str], console: Console) -> int:
    """Print versions, devices and kernels. Returns 1 when a kernel that says it runs here fails or computes
    something else.
    """
    options = _parser().parse_args(arguments)
    if options.head_dim < 1:
        raise ValueError(
            f"--head-dim is {options.head_dim}; it is the size of one attention head, 1 or more, e.g. "
            "--head-dim 128"
        )
    device = torch.device(detect_accelerator())
    console.print(_version_table())
    console.print(_device_table(device))
    table, failures = _kernel_table(device, options.head_dim)
    console.print(table)
    if options.hostfile is not None:
        failures += _unreachable(options.hostfile, console)
    for failure in failures:
        console.print(f"broken: {failure}", markup=False, highlight=False)
    return 1 if failures else 0


def _unreachable(hostfile: str, console: Console) -> list[str]:
    """What is wrong with the hosts of a hostfile, asked all at once; the good ones are told."""
    hosts = read_hostfile(hostfile)
    problems = reach(tuple(hosts), [Path()])
    for host, slots in hosts.items():
        if not any(problem.startswith(f"{host}:") for problem in problems):
            console.print(
                f"host {host}: reached, the same versions, code and folder; {len(slots)} slots",
                markup=False,
                highlight=False,
            )
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eagle3-ds doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--head-dim",
        type=int,
        default=128,
        metavar="D",
        help="size of one attention head, e.g. --head-dim 64",
    )
    parser.add_argument(
        "--hostfile", metavar="F", help="reach every host of it too, e.g. --hostfile recipes/2nodes.hostfile"
    )
    return parser


def _version_table() -> Table:
    table = Table("package", "version", title="versions")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    table.add_row("CUDA of torch", torch.version.cuda or "none: this torch is built without CUDA")
    table.add_row("cuDNN of torch", str(cudnn) if cudnn else "none")
    return table


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_table(device: torch.device) -> Table:
    table = Table("device", "name", "memory", title="devices")
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"
        table.add_row("cpu", name, "")
        return table
    backend = getattr(torch, device.type)
    for index in range(backend.device_count()):
        properties = backend.get_device_properties(index)
        capability = (
            f", compute capability {properties.major}.{properties.minor}" if device.type == "cuda" else ""
        )
        table.add_row(
            f"{device.type}:{index}",
            properties.name + capability,
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    return table


def _kernel_table(device: torch.device, head_dim: int) -> tuple[Table, list[str]]:
    """One row per kernel, and what is wrong with those that should run."""
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    measured = "largest relative error against the reference"
    title = f"attention kernels on {device} with heads of {head_dim}: {measured}"
    table = Table("kernel", *names, "why not", title=title)
    failures: list[str] = []
    automatic = {dtype: select_kernel("auto", device, dtype, head_dim) for dtype in _DTYPES}
    for kernel in KERNELS:
        cells, reasons = [], {}
        for dtype, name in zip(_DTYPES, names, strict=True):
            reason = kernel.unavailable_reason(device, dtype, head_dim)
            if reason is not None:
                reasons[name] = reason
                cells.append("no")
                continue
            result = _check(kernel, device, dtype, head_dim)
            if not result.startswith("error"):
                failures.append(f"{kernel.name} in {name}: {result}")
            cells.append(result + (", auto" if automatic[dtype] is kernel else ""))
        same = len(reasons) == len(names) and len(set(reasons.values())) == 1
        why = (
            next(iter(reasons.values()))
            if same
            else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
        table.add_row(kernel.name, *cells, why)
    return table, failures


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
