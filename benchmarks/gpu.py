"""`python -m benchmarks.gpu`: every check and every measurement that needs an accelerator, in one command of
a few minutes.

First `pytest tests/gpu`, then the training step of an 8B-shaped draft in bf16 at growing lengths: by
attention kernel and activation mode, and beside it the plain dense implementation. Hidden states come from
files mapped into memory, as a store hands them out. Each series of lengths has a process of its own and ends
where memory does; what no longer fits into the time is reported as not run. One JSON, written again after
every series.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.config.schema import TrainSection
from eagle3_ds.device.found import detect_accelerator, device_name
from eagle3_ds.device.kinds import CPU
from eagle3_ds.device.runtime import peak_allocated, restart_peak
from eagle3_ds.kernels import KERNELS, select_kernel
from eagle3_ds.layout import PackedSequence
from eagle3_ds.plan import DEVICES, attention_pairs, predict_memory, predict_time
from judge.dense_baseline import ATTENTION_FORMS, DenseDraft
from judge.product_step import ProductStep
from judge.ranks import run_ranks
from judge.result_file import FOLDER, matmul_rate, print_table, write_result
from judge.step_inputs import Side, StepModel, StepShape, TimedStep, make_model, make_pack, map_rows
from judge.tensor_bytes import TensorBytes

ROOT = Path(__file__).parents[1]
SHAPE_8B = StepShape(
    Eagle3Shape(
        4096, 14336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256, draft_vocab_size=32000
    )
)
SHAPE_TINY = StepShape(
    Eagle3Shape(64, 96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=160, draft_vocab_size=128),
    ttt_steps=3,
)
AGREEMENT = 2e-2
"""Largest relative difference of loss and gradient norm between product and dense implementation, bf16 each.
"""
# Kernels that are right everywhere and fast nowhere.
_NOT_RACED = ("reference", "blockwise")
# Share of the matmul rate assumed for the very first measurement's duration.
_FIRST_SHARE = 0.1
LENGTHS = tuple(2**power for power in range(13, 20))
TINY_LENGTHS = (96, 128, 160, 192)
# A step shorter than this is repeated.
_LONG_SECONDS, _ROUNDS = 2.5, 3
# Start of a process and of its engine; with less time left it is not worth beginning.
_START_SECONDS = 15.0
_TEST_MINUTES, _TEST_LINES = 2.0, 40
_DEEPSPEED = "zero2"


@dataclass(frozen=True)
class Series:
    """One configuration at ascending lengths. `way` is a kernel for the product, a form of attention for the
    dense side.
    """

    side: str
    way: str
    activation: str | None
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.side, self.way, self.activation)))


@dataclass(frozen=True)
class Figures:
    """One series at one length.

    Attributes:
        seconds: forward and backward, median; optimizer_seconds beside it (the product's).
        share: of `matmul_rate` (operations per second, bf16, measured just before), on the `flops` that the
            step needs.
        peak_bytes: all memory that tensors took on the device at once, training states included.
        predicted_seconds, predicted_bytes: the planner's, for the product; seconds for the devices that it
            knows.
    """

    seconds: float
    tokens_per_s: float
    flops: int
    matmul_rate: float
    share: float
    peak_bytes: int
    loss: float
    grad_norm: float
    optimizer_seconds: float | None
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Figures, or in `missing` why there are none: "out of memory", "not run: ..." or "failed: ..."."""

    series: Series
    length: int
    figures: Figures | None = None
    missing: str | None = None

    @staticmethod
    def from_dict(series: Series, values: dict[str, Any]) -> Measurement:
        figures = values["figures"]
        return Measurement(series, values["length"], figures and Figures(**figures), values["missing"])


@dataclass(frozen=True)
class Job:
    """What a series needs to run in a process of its own.

    Attributes:
        folder: holds `rows` rows of hidden states, or will. result: file that takes the measurements.
        deadline: a time of `time.time`.
    """

    series: Series
    shape: StepShape
    device: str
    folder: str
    rows: int
    result: str
    deadline: float


def plan_series(
    lengths: Sequence[int], auto: str, kernels: Sequence[str], activations: Sequence[str]
) -> list[Series]:
    """What is measured, most telling first: short runs of everything, then the longest lengths.

    Args:
        lengths: ascending. auto: the kernel that is chosen for users; kernels: the others. activations: of
            the recipe.
    """
    first, *other_modes = activations
    short, long = lengths[:-2], lengths[-2:]
    contrast = tuple(sorted({short[len(short) // 2], short[-1]}))
    return [
        Series("product", auto, first, tuple(short)),
        *(Series("dense", form, None, tuple(lengths)) for form in ATTENTION_FORMS),
        *(Series("product", kernel, first, contrast) for kernel in kernels),
        *(Series("product", auto, mode, contrast) for mode in other_modes),
        *(Series("product", auto, mode, tuple(long)) for mode in activations),
    ]


def measure_series(job: Job) -> None:
    """Measure a series, a line of JSON per length in `job.result` as soon as it is there. Runs in a world of
    one rank.
    """
    device = torch.device(job.device)
    model = make_model(job.shape, torch.bfloat16, device)
    rows = map_rows(model, job.rows, Path(job.folder), torch.bfloat16)
    side = _make_side(job.series, model, device)
    achieved: float | None = None
    for length in job.series.lengths:
        rate = matmul_rate(device, torch.bfloat16)
        flops = job.shape.flops(length)
        expected = flops / (achieved or _FIRST_SHARE * rate)
        rounds = _ROUNDS if expected < _LONG_SECONDS else 1
        missing = _no_time(expected * (rounds + 1), job.deadline - time.time())
        steps: list[TimedStep] = []
        peak = 0
        if missing is None:
            try:
                peak, steps = _run(side, make_pack(model, length, rows), rounds, device)
            except torch.OutOfMemoryError:
                missing = "out of memory"
        figures = (
            None
            if missing
            else replace(_figures(length, flops, rate, peak, steps), **_prediction(side, length, device))
        )
        with Path(job.result).open("a") as lines:
            lines.write(json.dumps(asdict(Measurement(job.series, length, figures, missing))) + "\n")
        if figures is None:
            return
        achieved = flops / figures.seconds


def _make_side(series: Series, model: StepModel, device: torch.device) -> Side:
    if series.activation is not None:
        return ProductStep(model, "bfloat16", series.activation, series.way, _DEEPSPEED)
    shape = model.shape
    return DenseDraft(
        model.weights, shape.config(), model.frozen, shape.rules, series.way, torch.bfloat16, device
    )


def _run(side: Side, pack: PackedSequence, rounds: int, device: torch.device) -> tuple[int, list[TimedStep]]:
    """Peak bytes of one step, and `rounds` timed ones after it."""
    if device.type != CPU:
        restart_peak(device)
        side.run(pack)
        peak = peak_allocated(device)
    else:
        with TensorBytes() as counted:
            side.run(pack)
        peak = counted.peak
    return peak, [side.run(pack) for _ in range(rounds)]


def _no_time(expected: float, left: float) -> str | None:
    return (
        None
        if expected <= left
        else f"not run: takes about {expected:.0f} s, and {max(0.0, left):.0f} s are left"
    )


def _figures(length: int, flops: int, rate: float, peak: int, steps: Sequence[TimedStep]) -> Figures:
    seconds, first = median(step.seconds for step in steps), steps[0]
    share = flops / seconds / rate
    return Figures(
        seconds,
        length / seconds,
        flops,
        rate,
        share,
        peak,
        first.loss,
        first.grad_norm,
        first.optimizer_seconds,
    )


def _prediction(side: Side, length: int, device: torch.device) -> dict[str, Any]:
    if not isinstance(side, ProductStep):
        return {}
    setup = side.setup(length)
    name = device_name(device.type) if device.type != CPU else ""
    known = next((of for key, of in DEVICES.items() if key in name), None)
    seconds = None
    if known is not None:
        parts = predict_time(setup, known, attention_pairs(setup)).parts
        seconds = sum(parts.values()) - parts["optimizer"]
    return {"predicted_seconds": seconds, "predicted_bytes": predict_memory(setup).peak}


def run_series(job: Job) -> list[Measurement]:
    """The series in a process of its own; a crash costs no more than the rest of the series."""
    result = Path(job.result)
    result.unlink(missing_ok=True)
    left = job.deadline - time.time()
    failure = None
    if left <= _START_SECONDS:
        failure = f"not run: {max(0.0, left):.0f} s are left"
    else:
        try:
            run_ranks(1, measure_series, job, timeout=left, device=job.device, threads=_threads(job.device))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failure = f"failed: {str(error).strip().splitlines()[-1]}"
    lines = result.read_text().splitlines() if result.exists() else []
    found = [Measurement.from_dict(job.series, json.loads(line)) for line in lines]
    if failure is not None:
        lengths = job.series.lengths
        found.append(Measurement(job.series, lengths[min(len(found), len(lengths) - 1)], missing=failure))
    return found


def _threads(device: str) -> int:
    """Beside a GPU the host has nothing else to do; in tiny there is nothing to share."""
    return len(os.sched_getaffinity(0)) if device != CPU else 1


def run_gpu_tests(seconds: float) -> dict[str, Any]:
    """`pytest tests/gpu`, in as many processes as there are cores for: whether it passed, and what it printed
    last. None of them is left when this returns, because measurements follow.
    """
    workers = str(max(1, min(12, len(os.sched_getaffinity(0)) * 3 // 4)))
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "-n", workers]
    # pytest-benchmark, where it is installed, warns in every worker.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        # One thread each: the references on the CPU would share the cores badly.
        tests = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            tests.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tests.pid, signal.SIGKILL)
        status = tests.wait()
        said.seek(0)
        output = said.read().strip().splitlines()
    if status < 0:
        output.append(f"stopped after {seconds:.0f} s")
    return {
        "passed": status == 0,
        "seconds": time.perf_counter() - started,
        "output": output[-_TEST_LINES:],
    }


def summarise(measurements: Sequence[Measurement], auto: str, activation: str) -> dict[str, Any]:
    """What the table says in three numbers, for the product as it comes (`auto`, the first activation mode).

    Returns:
        largest_difference: of loss and gradient norm from the dense side, relative, over the lengths of both;
            None without any.
        dense_longest, times_faster: the longest length that the dense side survives, and tokens/s there over
            its best.
        longest: of the product in any mode, with its peak bytes.
    """
    product = [
        (m.length, m.series, m.figures) for m in measurements if m.figures and m.series.side == "product"
    ]
    ours = {
        length: figures
        for length, series, figures in product
        if (series.way, series.activation) == (auto, activation)
    }
    dense: dict[int, list[Figures]] = defaultdict(list)
    for m in measurements:
        if m.figures and m.series.side == "dense" and m.length in ours:
            dense[m.length].append(m.figures)
    differences = [
        abs(getattr(ours[length], name) - getattr(figures, name)) / abs(getattr(figures, name))
        for length, forms in dense.items()
        for figures in forms
        for name in ("loss", "grad_norm")
    ]
    at = max(dense, default=None)
    faster = None if at is None else min(figures.seconds for figures in dense[at]) / ours[at].seconds
    longest = None
    if product:
        length, series, figures = max(product, key=lambda entry: entry[0])
        longest = {"series": str(series), "length": length, "bytes": figures.peak_bytes}
    return {
        "largest_difference": max(differences, default=None),
        "dense_longest": at,
        "times_faster": faster,
        "longest": longest,
    }


def show(measurements: Sequence[Measurement]) -> None:
    """The table."""

    def cells(m: Measurement) -> tuple[object, ...]:
        f = m.figures
        if f is None:
            return (m.series, m.length, m.missing)
        seconds, of_bytes = f.predicted_seconds, f.predicted_bytes
        return (
            m.series,
            m.length,
            f"{f.seconds:.2f}",
            f"{seconds:.2f}" if seconds else None,
            f"{f.tokens_per_s:.0f}",
            f"{f.share:.0%} of {f.matmul_rate / 1e12:.0f}",
            f"{f.peak_bytes / 2**30:.1f}",
            f"{of_bytes / 2**30:.1f}" if of_bytes else None,
        )

    columns = ("series", "slots", "s", "planned", "tokens/s", "share of TFLOP/s", "peak GiB", "planned")
    print_table("one training step, forward and backward, bf16", columns, map(cells, measurements))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    command, deadline = " ".join(("python -m benchmarks.gpu", *arguments)), time.time() + 60 * options.minutes
    device, shape = (CPU, SHAPE_TINY) if options.tiny else (detect_accelerator(), SHAPE_8B)
    auto, others = _kernels(torch.device(device), shape.draft.head_dim)
    activations = get_args(TrainSection.model_fields["activation"].annotation)
    modes = [mode for mode in ("recompute", "offload") if mode in activations]
    lengths = TINY_LENGTHS if options.tiny else LENGTHS
    record: dict[str, Any] = {
        "shape": asdict(shape),
        "dtype": "bfloat16",
        "deepspeed": _DEEPSPEED,
        "kernel": auto,
    }
    record["tests"] = run_gpu_tests(60 * _TEST_MINUTES)
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="hidden-rows-", dir=options.scratch) as folder:
        _require_disk(Path(folder), shape, max(lengths))
        for series in plan_series(lengths, auto, others, modes):
            job = Job(
                series, shape, device, folder, max(lengths), str(Path(folder) / "series.jsonl"), deadline
            )
            measurements += run_series(job)
            record["measurements"] = [asdict(m) for m in measurements]
            record["summary"] = summarise(measurements, auto, modes[0])
            path = write_result("gpu", command, record, options.folder, _threads(device))
            print(
                f"{series}: {measurements[-1].length} slots, {deadline - time.time():.0f} s left", flush=True
            )
    show(measurements)
    print(*record["tests"]["output"][-1:], record["summary"], path, sep="\n")
    return 0 if _is_good(record) else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for everything; what does not fit is reported as not run"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where the hidden states of the longest length lie, 17 GB"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on the CPU: checks this program, measures nothing"
    )
    options = parser.parse_args(arguments)
    if options.tiny and options.folder.resolve().is_relative_to(FOLDER.resolve()):
        parser.error(
            f"--tiny measures nothing, so {options.folder} is no place for it: give --folder one outside of "
            f"{FOLDER}."
        )
    if not options.tiny and detect_accelerator() == CPU:
        parser.error("no accelerator here. --tiny --folder DIR runs this program in tiny on the CPU.")
    return options


def _kernels(device: torch.device, head_dim: int) -> tuple[str, list[str]]:
    """The kernel that `auto` picks, and the others worth measuring."""
    auto = select_kernel("auto", device, torch.bfloat16, head_dim).name
    usable = [
        kernel.name
        for kernel in KERNELS
        if kernel.unavailable_reason(device, torch.bfloat16, head_dim) is None
    ]
    return auto, [name for name in usable if name not in (auto, *_NOT_RACED)]


def _require_disk(folder: Path, shape: StepShape, length: int) -> None:
    needed, free = length * 4 * shape.draft.hidden_size * 2, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--scratch: hidden states of {length} slots take {needed / 1e9:.1f} GB, and {folder.parent} has "
            f"{free / 1e9:.1f} GB free. Give another folder."
        )


def _is_good(record: dict[str, Any]) -> bool:
    """Tests passed, nothing crashed, and both sides computed the same step."""
    difference = record["summary"]["largest_difference"]
    crashed = [m for m in record["measurements"] if (m["missing"] or "").startswith("failed")]
    return record["tests"]["passed"] and not crashed and difference is not None and difference <= AGREEMENT


if __name__ == "__main__":
    sys.exit(main())
