"""`python -m benchmarks.step`: one training step on this CPU, the product against the plain dense
implementation.

Both start from the same weights and packs, alternate within one process, and must agree on loss and gradient,
or the benchmark fails. Timed is, for both, from the packed sequence in memory to the loss and the norm of
whole gradients: forward and backward. The product runs under its DeepSpeed engine (ZeRO 0, fp32, world size
1), cuts the sequence and computes accuracies besides; its optimizer is timed apart. The dense side computes
the teacher's full-vocabulary argmax, which the product's store holds since capture. With --supervised below 1
the tokens are turns of questions and answers, and the answers alone are in the loss, as in chats; the dense
side computes every slot all the same, as the paper's code does. Prints a table, writes JSON, draws a picture.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.layout import PackedSequence
from judge.dense_baseline import ATTENTION_FORMS, DenseDraft
from judge.product_step import ProductStep
from judge.ranks import run_ranks
from judge.result_file import FOLDER, PICTURES, matmul_rate, print_table, write_result
from judge.step_inputs import Side, StepShape, TimedStep, make_model, make_pack, make_rows
from judge.tensor_bytes import TensorBytes

SHAPE = StepShape(
    Eagle3Shape(512, 1536, num_heads=8, num_kv_heads=8, head_dim=64, vocab_size=32000, draft_vocab_size=8192)
)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHARES = (1.0, 0.25)
"""Of the tokens that are supervised: all of them, and those of a long context with its answers."""
TOLERANCE = 1e-4
"""Largest relative difference of loss, gradient norm and gradients, fp32 against fp32."""
_CHOOSE_AT = 2048
_PATIENCE = 24 * 3600.0
# Share of the free memory that the dense side may be expected to take.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Measured:
    """One side at one length. Medians over the rounds; `peak_bytes` of tensors beyond what lived before the
    step.
    """

    seconds: float
    tokens_per_s: float
    peak_bytes: int
    loss: float
    grad_norm: float
    optimizer_seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One length.

    Attributes:
        supervised: share of its tokens that is in the loss.
        matmul_rate: floating-point operations per second of a large matrix product, measured between the
            rounds.
        share: of that rate, reached by the product on `flops`, the operations that the step cannot do
            without.
        dense: None with the reason in `dense_missing`.
    """

    length: int
    flops: int
    matmul_rate: float
    ours: Measured
    share: float
    dense: Measured | None = None
    dense_missing: str | None = None
    supervised: float = 1.0

    @property
    def faster(self) -> float | None:
        return self.dense.seconds / self.ours.seconds if self.dense else None

    @property
    def smaller(self) -> float | None:
        return self.dense.peak_bytes / self.ours.peak_bytes if self.dense else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "faster": self.faster, "smaller": self.smaller}


class DisagreementError(Exception):
    """The two sides did not compute the same step."""


class Comparison:
    """Both sides of one shape. Needs a world of one rank (`run_ranks`)."""

    def __init__(self, shape: StepShape, activation: str, choose_at: int = _CHOOSE_AT) -> None:
        """Builds both, and takes the faster form of dense attention at `choose_at` slots."""
        self.model = make_model(shape)
        self.ours = ProductStep(self.model, "float32", activation)
        self.form_seconds = {form: self._seconds_of_form(form, choose_at) for form in ATTENTION_FORMS}
        self.form = min(self.form_seconds, key=lambda form: self.form_seconds[form])
        self.dense = self._dense(self.form)
        self.choose_at = choose_at

    def rows(self, lengths: Sequence[int], rounds: int, supervised: float = 1.0) -> Iterator[Row]:
        """Measure each length, ascending; where there is no dense side to alternate with, one round is
        enough.

        Raises:
            DisagreementError: loss or gradient norm differ.
        """
        last: Row | None = None
        for length in sorted(lengths):
            missing = _too_large(last, length)
            last = self._row(length, supervised, 1 if missing else rounds, missing)
            yield last

    def _row(self, length: int, supervised: float, rounds: int, missing: str | None) -> Row:
        pack = self._pack(length, supervised)
        sides: list[Side] = [self.ours] if missing else [self.ours, self.dense]
        peaks = [_peak_bytes(side, pack) for side in sides]
        rates: list[float] = []
        steps: list[list[TimedStep]] = [[] for _ in sides]
        for _ in range(rounds):
            rates.append(matmul_rate(torch.device("cpu"), torch.float32))
            for side, of_side in zip(sides, steps, strict=True):
                of_side.append(side.run(pack))
        ours, *dense = (_summarise(of_side, peak, length) for of_side, peak in zip(steps, peaks, strict=True))
        flops = self.model.shape.flops(length, supervised)
        share = median(flops / step.seconds / rate for step, rate in zip(steps[0], rates, strict=True))
        if dense:
            _require_equal(
                length,
                {"loss": (ours.loss, dense[0].loss), "gradient norm": (ours.grad_norm, dense[0].grad_norm)},
            )
        return Row(
            length, flops, median(rates), ours, share, dense[0] if dense else None, missing, supervised
        )

    def _dense(self, form: str) -> DenseDraft:
        shape = self.model.shape
        return DenseDraft(self.model.weights, shape.config(), self.model.frozen, shape.rules, form)

    def _seconds_of_form(self, form: str, length: int) -> float:
        dense, pack = self._dense(form), self._pack(length, 1.0)
        dense.run(pack)
        return median(dense.run(pack).seconds for _ in range(3))

    def compare_gradients(self, supervised: float) -> float:
        """Largest relative difference of a parameter's gradient.

        Raises:
            DisagreementError: it exceeds TOLERANCE.
        """
        length = self.choose_at
        pack = self._pack(length, supervised)
        self.dense.run(pack)
        theirs, ours = self.dense.gradients(), self.ours.gradients(pack)
        differences = {
            name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs
        }
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= TOLERANCE:
            raise DisagreementError(
                f"{length} slots: the gradients of {worst} differ by {differences[worst]:.1e}, over "
                f"{TOLERANCE}."
            )
        return differences[worst]

    def _pack(self, length: int, supervised: float) -> PackedSequence:
        return make_pack(self.model, length, make_rows(self.model, length), supervised)


def _peak_bytes(side: Side, pack: PackedSequence) -> int:
    with TensorBytes() as counted:
        side.run(pack)
    return counted.above_baseline


def _summarise(steps: Sequence[TimedStep], peak_bytes: int, length: int) -> Measured:
    seconds = median(step.seconds for step in steps)
    of_optimizer = [step.optimizer_seconds for step in steps if step.optimizer_seconds is not None]
    optimizer_seconds = median(of_optimizer) if of_optimizer else None
    return Measured(
        seconds, length / seconds, peak_bytes, steps[0].loss, steps[0].grad_norm, optimizer_seconds
    )


def _require_equal(length: int, pairs: dict[str, tuple[float, float]]) -> None:
    for name, (ours, dense) in pairs.items():
        if not abs(ours - dense) <= TOLERANCE * abs(dense):
            raise DisagreementError(
                f"{length} slots: the {name} is {ours} here and {dense} in the dense implementation."
            )


def _too_large(last: Row | None, length: int) -> str | None:
    """Why the dense side cannot be run, judged by what it took at the last length; its bytes grow with the
    square.
    """
    if last is None:
        return None
    if last.dense is None:
        return last.dense_missing
    expected = last.dense.peak_bytes * (length / last.length) ** 2
    free = free_memory()
    if expected <= _MEMORY_SHARE * free:
        return None
    return f"needs about {expected / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def free_memory() -> int:
    """Bytes that this machine has left."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "/proc/meminfo has no MemAvailable"
    return int(found[1]) * 1024


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time and bytes against the length, both sides, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, byte_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shares = sorted({row.supervised for row in rows}, reverse=True)
    for share in shares:
        of_share = [row for row in rows if row.supervised == share]
        lengths = [row.length for row in of_share]
        label = "eagle3_ds" if share == 1 else f"eagle3_ds, {share:.0%} supervised"
        time_axis.plot(lengths, [row.ours.seconds for row in of_share], "o-", label=label)
        byte_axis.plot(lengths, [row.ours.peak_bytes / 1e9 for row in of_share], "o-", label=label)
    of_share = [row for row in rows if row.supervised == shares[0]]
    lengths, dense = (
        [row.length for row in of_share],
        [(row.length, row.dense) for row in of_share if row.dense],
    )
    dense_lengths = [length for length, _ in dense]
    time_axis.plot(dense_lengths, [side.seconds for _, side in dense], "s-", label="dense")
    time_axis.plot(
        lengths, [row.flops / row.matmul_rate for row in of_share], "k:", label="operations / matmul rate"
    )
    byte_axis.plot(dense_lengths, [side.peak_bytes / 1e9 for _, side in dense], "s-", label="dense")
    for axis, label in ((time_axis, "seconds per step"), (byte_axis, "peak GB of tensors beyond the states")):
        axis.set(xscale="log", yscale="log", xlabel="slots", ylabel=label)
        axis.set_xticks(
            lengths,
            [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths],
            minor=False,
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(rows: Sequence[Row]) -> None:
    """The table."""

    def cells(row: Row) -> tuple[object, ...]:
        dense = row.dense
        return (
            row.length,
            f"{row.supervised:.0%}",
            f"{row.ours.seconds:.2f}",
            f"{dense.seconds:.2f}" if dense else None,
            f"{row.faster:.1f}" if row.faster else row.dense_missing,
            f"{row.ours.tokens_per_s:.0f}",
            f"{row.ours.peak_bytes / 1e6:.0f}",
            f"{dense.peak_bytes / 1e6:.0f}" if dense else None,
            f"{row.smaller:.1f}" if row.smaller else None,
            f"{row.share:.0%} of {row.matmul_rate / 1e9:.0f}",
        )

    columns = (
        "slots",
        "supervised",
        "s",
        "dense s",
        "times faster",
        "tokens/s",
        "MB",
        "dense MB",
        "times smaller",
        "share of GFLOP/s",
    )
    print_table("one training step, forward and backward", columns, map(cells, rows))


def run(
    shape: StepShape,
    lengths: Sequence[int],
    rounds: int,
    activation: str,
    choose_at: int = _CHOOSE_AT,
    shares: Sequence[float] = (1.0,),
) -> tuple[list[Row], dict[str, Any]]:
    """Measure. Returns the rows and the record that goes to the JSON."""
    comparison = Comparison(shape, activation, choose_at)
    rows, difference = [], 0.0
    for share in shares:
        difference = max(difference, comparison.compare_gradients(share))
        for row in comparison.rows(lengths, rounds, share):
            rows.append(row)
            dense = row.dense.seconds if row.dense else row.dense_missing
            print(
                f"{row.length} slots, {share:.0%} supervised: {row.ours.seconds:.2f} s, dense {dense}",
                flush=True,
            )
    record = {
        "timed": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "shape": asdict(shape),
        "activation": activation,
        "kernel": comparison.ours.trainer.kernel_name,
        "rounds": rounds,
        "dense_attention": {
            "seconds": comparison.form_seconds,
            "slots": choose_at,
            "chosen": comparison.form,
        },
        "largest_gradient_difference": difference,
        "rows": [row.as_dict() for row in rows],
    }
    return rows, record


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L")
    parser.add_argument(
        "--supervised",
        type=float,
        nargs="+",
        default=SHARES,
        metavar="SHARE",
        help="of the tokens, in the loss",
    )
    parser.add_argument("--rounds", type=int, default=3, help="alternations per length; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--activation", default="recompute", help="train.activation of the recipe")
    parser.add_argument("--kv-heads", type=int, default=SHAPE.draft.num_kv_heads)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where the picture goes")
    options = parser.parse_args(arguments)
    if min(*options.lengths, options.rounds) < 1:
        parser.error(f"--lengths {options.lengths} and --rounds {options.rounds} must be positive.")
    if not all(0 < share <= 1 for share in options.supervised):
        parser.error(f"--supervised {options.supervised}: give shares above 0 and up to 1.")
    shape = replace(SHAPE, draft=replace(SHAPE.draft, num_kv_heads=options.kv_heads))
    job = (shape, options.lengths, options.rounds, options.activation, _CHOOSE_AT, options.supervised)
    ((rows, record),) = run_ranks(1, run, *job, timeout=_PATIENCE, threads=options.threads)
    show(rows)
    command = " ".join(("python -m benchmarks.step", *arguments))
    path, picture = (
        write_result("step", command, record, options.folder, options.threads),
        options.pictures / "step.png",
    )
    draw(rows, picture)
    print(f"{path} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
