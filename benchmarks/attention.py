"""`python -m benchmarks.attention`: the rate of each attention kernel that runs here, forward and backward.

One causal document, eight documents packed, and one document under a sliding window, at several lengths.
Rates count the visible query-key pairs only (4 FLOP per pair, head and head dim forward, 10 backward), so
that a kernel which computes what the mask hides is not paid for it. Beside them stands the matmul rate of the
same device and precision, measured in the same run, and on a CPU torch's bare flash operator, which shows
what the kernel's interface costs. With one thread (OMP_NUM_THREADS=1) processor time is taken, which other
programs do not lengthen; otherwise elapsed time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eagle3_ds.attention.tiles import gathered_tiles
from eagle3_ds.device.found import detect_accelerator, device_name
from eagle3_ds.device.kinds import CPU, KINDS
from eagle3_ds.device.runtime import synchronize
from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile
from eagle3_ds.layout import SpanPlan
from judge.result_file import FOLDER, write_result

NUM_DOCUMENTS, WINDOW_SHARE = 8, 4
FORWARD_FLOP, BACKWARD_FLOP = 4, 10
BARE_OPERATOR = "bare operator"


@dataclass(frozen=True)
class Setting:
    """What is measured where: head counts and size, precision, lengths, and the size of the square matmul."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...]
    matmul_size: int


SETTINGS = {
    "cpu": Setting(8, 8, 64, "float32", (1024, 2048, 4096), 2048),
    "accelerator": Setting(32, 8, 128, "bfloat16", (8192, 16384, 32768, 65536, 131072), 8192),
}


@dataclass(frozen=True)
class Rate:
    """One kernel on one case: seconds of the best run; None where a shorter length says that it would pass
    the limit.
    """

    case: str
    length: int
    kernel: str
    forward_flop: float
    forward_seconds: float | None
    backward_seconds: float | None

    @property
    def forward_tflops(self) -> float | None:
        return None if self.forward_seconds is None else self.forward_flop / self.forward_seconds / 1e12

    @property
    def backward_tflops(self) -> float | None:
        if self.backward_seconds is None:
            return None
        return self.forward_flop * BACKWARD_FLOP / FORWARD_FLOP / self.backward_seconds / 1e12


class Operands(NamedTuple):
    """q, dout [L, Hq, D], k, v [L, Hkv, D] and the tiles of one case."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    tiles: tuple[Tile, ...]


def visible_pairs(tiles: Sequence[Tile]) -> int:
    """Query-key pairs that the tiles show."""
    total = 0
    for tile in tiles:
        own = np.arange(tile.num_queries, dtype=np.int64) + tile.num_keys - tile.num_queries
        last = own if tile.causal else np.full_like(own, tile.num_keys - 1)
        first = np.zeros_like(own) if tile.left is None else np.maximum(own - tile.left, 0)
        total += int((last - first + 1).sum())
    return total


def share_kept(kernel_tflops: float, attention_flop: float, step_seconds: float) -> float:
    """Share of a kernel's rate that a whole USP training step keeps.

    Args:
        kernel_tflops: of forward and backward together, as this benchmark measures them alone.
        attention_flop: of all attention that one rank computes in the step, `visible_pairs` times heads, head
            size and `FORWARD_FLOP + BACKWARD_FLOP`, over all TTT steps.
        step_seconds: measured time of the whole step.
    """
    return attention_flop / step_seconds / 1e12 / kernel_tflops


def best_seconds(
    functions: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """Shortest time of each function, their runs taking turns so that a busy machine hits all alike. One
    warm-up each.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(functions)
    for turn in range(repeats + 1):
        for i, function in enumerate(functions):
            synchronize(device)
            started = clock()
            function()
            synchronize(device)
            if turn:
                best[i] = min(best[i], clock() - started)
    return best


def matmul_tflops(setting: Setting, device: torch.device, repeats: int) -> float:
    a, b = (
        torch.randn(setting.matmul_size, setting.matmul_size, device=device).to(_dtype(setting))
        for _ in range(2)
    )
    (seconds,) = best_seconds([lambda: a @ b], device, repeats)
    return 2 * setting.matmul_size**3 / seconds / 1e12


def make_operands(case: str, length: int, setting: Setting, device: torch.device) -> Operands:
    """Random operands of one case; its tiles come from the product's plan."""
    plan = SpanPlan.make([length // NUM_DOCUMENTS] * NUM_DOCUMENTS if case == "eight documents" else [length])
    window = length // WINDOW_SHARE if case == "sliding window" else None
    # Drawn where they are needed: a host takes longer over them than a GPU over their attention.
    generator = torch.Generator(device).manual_seed(0)

    def rows(num_heads: int) -> Tensor:
        size = (length, num_heads, setting.head_dim)
        return torch.randn(size, generator=generator, device=device).to(_dtype(setting))

    q, k, v, dout = (
        rows(n) for n in (setting.num_heads, setting.num_kv_heads, setting.num_kv_heads, setting.num_heads)
    )
    return Operands(q, k, v, dout, gathered_tiles(plan, 0, window))


def passes(kernel: AttentionKernel, operands: Operands) -> tuple[Callable[[], object], Callable[[], object]]:
    """The kernel's forward and backward on these operands."""
    q, k, v, dout, tiles = operands
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, tiles, scale)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    return (
        lambda: kernel.forward(q, k, v, tiles, scale),
        lambda: kernel.backward(dout, q, k, v, lse, delta, tiles, scale, dk, dv),
    )


def bare_operator_passes(operands: Operands) -> tuple[Callable[[], object], Callable[[], object]]:
    """torch's flash operator for CPUs on one causal document, key heads repeated beforehand, nothing around
    it.
    """
    group = operands.q.shape[1] // operands.k.shape[1]
    repeated = (
        operands.q,
        *(x.repeat_interleave(group, dim=1) for x in (operands.k, operands.v)),
        operands.dout,
    )
    q, k, v, dout = (x.transpose(0, 1)[None] for x in repeated)
    scale = q.shape[-1] ** -0.5
    forward, backward = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    out, lse = forward(q, k, v, 0.0, True, scale=scale)
    return (
        lambda: forward(q, k, v, 0.0, True, scale=scale),
        lambda: backward(dout, q, k, v, out, lse, 0.0, True, scale=scale),
    )


def measure(
    setting: Setting, device: torch.device, repeats: int, limit: float, kernels: Sequence[str] | None = None
) -> list[Rate]:
    """Every usable kernel on every case.

    Args:
        limit: longest time of one pass in seconds, extrapolated from the length before.
        kernels: only these; None for all but `reference`.
    """
    chosen = kernels or [kernel.name for kernel in KERNELS if kernel.name != "reference"]
    usable = [kernel for kernel in KERNELS if kernel.name in chosen and _runs(kernel, setting, device)]
    rates: list[Rate] = []
    for case in ("one document", "eight documents", "sliding window"):
        slowest = dict.fromkeys([kernel.name for kernel in usable], 0.0)
        for length in setting.lengths:
            operands = make_operands(case, length, setting, device)
            flop = FORWARD_FLOP * float(visible_pairs(operands.tiles)) * setting.num_heads * setting.head_dim
            running = [kernel for kernel in usable if slowest[kernel.name] <= limit]
            functions = {kernel.name: passes(kernel, operands) for kernel in running}
            if device.type == "cpu" and case == "one document":
                functions[BARE_OPERATOR] = bare_operator_passes(operands)
            seconds = [
                best_seconds([pair[i] for pair in functions.values()], device, repeats) for i in range(2)
            ]
            for name, forward, backward in zip(functions, *seconds, strict=True):
                rates.append(Rate(case, length, name, flop, forward, backward))
                # Twice the length is four times the work.
                slowest[name] = 4 * max(forward, backward)
            rates.extend(
                Rate(case, length, kernel.name, flop, None, None)
                for kernel in usable
                if kernel not in running
            )
    return rates


def show(rates: Sequence[Rate], matmul: float, console: Console) -> None:
    unit, factor = ("TFLOP/s", 1.0) if matmul >= 10 else ("GFLOP/s", 1e3)
    rate_of_matmul = f"matmul in the same precision: {matmul * factor:.0f} {unit}"
    title = f"attention kernels, {unit} of visible pairs; {rate_of_matmul}"
    table = Table("case", "tokens", "kernel", "forward", "of matmul", "backward", "of matmul", title=title)
    for rate in rates:
        cells: list[str] = []
        for tflops in (rate.forward_tflops, rate.backward_tflops):
            cells += (
                ["over the limit", ""]
                if tflops is None
                else [f"{tflops * factor:.1f}", f"{tflops / matmul:.0%}"]
            )
        table.add_row(rate.case, str(rate.length), rate.kernel, *cells)
    console.print(table)


def _runs(kernel: AttentionKernel, setting: Setting, device: torch.device) -> bool:
    return kernel.unavailable_reason(device, _dtype(setting), setting.head_dim) is None


def _dtype(setting: Setting) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, setting.dtype)
    return dtype


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", choices=tuple(KINDS), default=detect_accelerator())
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, ascending, each a multiple of 8")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each pass; the shortest counts")
    parser.add_argument(
        "--kernels", nargs="+", choices=[kernel.name for kernel in KERNELS], help="only these"
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, help="leave out a pass that would take more seconds than this"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    device, setting = torch.device(options.device), SETTINGS[CPU if options.device == CPU else "accelerator"]
    if options.lengths and any(length < 1 or length % NUM_DOCUMENTS for length in options.lengths):
        parser.error(
            f"--lengths {options.lengths}: each is cut into {NUM_DOCUMENTS} documents, so use multiples of "
            f"{NUM_DOCUMENTS}"
        )
    if options.lengths:
        setting = Setting(**{**asdict(setting), "lengths": tuple(options.lengths)})
    matmul = matmul_tflops(setting, device, options.repeats)
    rates = measure(setting, device, options.repeats, options.limit, options.kernels)
    show(rates, matmul, Console())
    name = f"{torch.get_num_threads()} threads" if device.type == CPU else device_name(device.type)
    rows = [
        asdict(rate) | {"forward_tflops": rate.forward_tflops, "backward_tflops": rate.backward_tflops}
        for rate in rates
    ]
    body = {"device": f"{device}: {name}", "setting": asdict(setting), "matmul_tflops": matmul, "rates": rows}
    command = " ".join(
        ("python -m benchmarks.attention", *(sys.argv[1:] if arguments is None else arguments))
    )
    print(write_result("attention", command, body, options.folder))


if __name__ == "__main__":
    main()
