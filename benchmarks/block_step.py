"""`python -m benchmarks.block_step`: one training step of DFlash and of P-EAGLE on this CPU, the product
against the training code of speculators and SpecForge.

The other package runs in its own environment (tests/served/make_environment.sh) as one process that stays;
both sides alternate, with the same weights, rows, anchors or guesses, in fp32, with as many threads. Where
they compute the same they must agree on loss and gradients, or the benchmark fails. Timed is, for both, from
the rows in memory to the loss and the norm of whole gradients: forward and backward, with each side's own
metrics. The product runs under its DeepSpeed engine (ZeRO 0, world size 1), cuts the sequence besides; its
optimizer is timed apart. The other side attends in the fastest of its forms that runs here. Prints a table,
writes JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.step import free_memory
from judge.block_steps import (
    BlockModel,
    Pair,
    Sizes,
    StepCase,
    StepInputs,
    comparable,
    for_peer,
    make_inputs,
    make_model,
)
from judge.peer_process import REPOSITORY, Peer, PeerError
from judge.ranks import run_ranks
from judge.result_file import FOLDER, print_table, write_result
from judge.step_inputs import TimedStep
from judge.tensor_bytes import TensorBytes

PAIRS = (Pair("specforge", "dflash"), Pair("speculators", "dflash"), Pair("speculators", "peagle"))
LENGTHS, ANCHORS = (2048, 4096), (128, 512)
FORMS: Mapping[str, tuple[str, ...]] = {
    "speculators": ("eager", "sdpa", "simple_flex_attention"),
    "specforge": ("eager", "sdpa", "flex_attention"),
}
"""Of attention, by the names of the package."""
TOLERANCE = 1e-4
"""Largest relative difference of loss and gradients, fp32 against fp32."""
DIFFERENCES: Mapping[Pair, str] = {
    Pair("specforge", "dflash"): (
        "Its head is frozen, ours is trained. It learns the text, ours the teacher's distribution, here sure "
        "of the text. Its vocabulary is the target's; so is ours here."
    ),
    Pair("speculators", "dflash"): (
        "Its head is frozen, ours is trained. Its loss is the divergence, less by the teacher's entropy. Its "
        "fused losses need Triton: here its eager one."
    ),
    Pair("speculators", "peagle"): (
        "Its head is frozen, ours is trained. It trains the whole embedding, ours the mask token's row. Its "
        "loss is the divergence, less by the teacher's entropy. Its fused losses need Triton: here its eager "
        "one. Where its rule draws guesses it trains fewer than ours, and losses are not compared."
    ),
}
_CHOOSE_AT = 1024
_PATIENCE = 24 * 3600.0
_MEMORY_SHARE = 0.9
"""Of the free memory, that the other side may be expected to take."""


@dataclass(frozen=True)
class Measured:
    """One side of one case. The median of the rounds; `peak_bytes` of tensors beyond what lived before."""

    seconds: float
    peak_bytes: int
    loss: float


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        theirs: None with the reason in `missing`.
        difference: of the losses, relative; None where they are not of the same guesses.
    """

    pair: Pair
    case: StepCase
    ours: Measured
    theirs: Measured | None
    missing: str | None = None
    difference: float | None = None

    @property
    def faster(self) -> float | None:
        return self.theirs.seconds / self.ours.seconds if self.theirs else None

    @property
    def smaller(self) -> float | None:
        return self.theirs.peak_bytes / self.ours.peak_bytes if self.theirs else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "faster": self.faster, "smaller": self.smaller}


class DisagreementError(Exception):
    """The two sides did not compute the same step."""


def cases_of(pair: Pair, lengths: Sequence[int], anchors: Sequence[int]) -> list[StepCase]:
    """By length: numbers of anchors for DFlash; for P-EAGLE all guesses, and those of the other's rule."""
    if pair.algorithm == "dflash":
        return [StepCase(length, count) for length in sorted(lengths) for count in sorted(anchors)]
    return [StepCase(length, drawn=drawn) for drawn in (False, True) for length in sorted(lengths)]


class Comparison:
    """Both sides of one pair. Needs a world of one rank (`run_ranks`), and `peer` to run."""

    def __init__(
        self, pair: Pair, sizes: Sizes, activation: str, peer: Peer, folder: Path, choose_at: StepCase
    ) -> None:
        """Builds both, and takes the fastest form of the other's attention at `choose_at`, where gradients
        are compared too.

        Raises:
            DisagreementError: the gradients differ.
            PeerError: no form runs.
        """
        self.model: BlockModel = make_model(pair, sizes, activation)
        self.ours = self.model.product()
        self._peer, self._folder = peer, folder
        inputs = make_inputs(self.model, choose_at)
        self.forms = {form: self._seconds_of_form(form, inputs) for form in FORMS[pair.package]}
        run = {form: seconds for form, seconds in self.forms.items() if isinstance(seconds, float)}
        if not run:
            raise PeerError(f"no form of attention of {pair.package} runs here: {self.forms}")
        self.form = min(run, key=lambda form: run[form])
        self.gradient_difference = self._compare_gradients(inputs)

    def rows(self, cases: Sequence[StepCase], rounds: int) -> Iterator[Row]:
        """Measure each case.

        Raises:
            DisagreementError: the losses differ.
        """
        last: Row | None = None
        for case in cases:
            last = self._row(case, rounds, last)
            yield last

    def _row(self, case: StepCase, rounds: int, last: Row | None) -> Row:
        inputs, pair = make_inputs(self.model, case), self.model.pair
        with TensorBytes() as counted:
            self.ours.run(inputs.pack)
        missing = too_large(last, case)
        their_bytes = 0
        if missing is None:
            self._load(inputs, self.form)
            their_bytes = self._peer.ask("bytes")["peak_bytes"]
        steps: list[TimedStep] = []
        answers: list[dict[str, Any]] = []
        for _ in range(1 if missing else rounds):
            steps.append(self.ours.run(inputs.pack))
            if missing is None:
                answers.append(self._peer.ask("run"))
        ours = Measured(median(step.seconds for step in steps), counted.above_baseline, steps[0].loss)
        if missing is not None:
            return Row(pair, case, ours, None, missing)
        theirs = Measured(median(one["seconds"] for one in answers), their_bytes, answers[0]["loss"])
        difference = None if case.drawn else self._compare_losses(inputs, ours.loss, theirs.loss)
        return Row(pair, case, ours, theirs, None, difference)

    def _load(self, inputs: StepInputs, form: str) -> None:
        path = self._folder / "case"
        torch.save(for_peer(self.model, inputs), path)
        self._peer.ask("load", case=str(path), attention=form)

    def _seconds_of_form(self, form: str, inputs: StepInputs) -> float | str:
        """Or why it does not run."""
        try:
            self._load(inputs, form)
            self._peer.ask("run")
            return min(float(self._peer.ask("run")["seconds"]) for _ in range(2))
        except PeerError as error:
            return str(error)

    def _compare_losses(self, inputs: StepInputs, ours: float, theirs: float) -> float:
        way = comparable(self.model, inputs)
        expected = ours * way.factor - way.entropy
        return require_close(f"{inputs.case.length} tokens: the loss", expected, theirs)

    def _compare_gradients(self, inputs: StepInputs) -> float:
        """The largest relative difference of a parameter's gradient that both sides train."""
        path, factor = self._folder / "gradients", comparable(self.model, inputs).factor
        self._load(inputs, self.form)
        self._peer.ask("run")
        self._peer.ask("gradients", to=str(path))
        ours, theirs = self.ours.gradients(inputs.pack), torch.load(path)
        if theirs.keys() != ours.keys() - {"lm_head.weight"}:
            raise DisagreementError(f"it trains {sorted(theirs)}, the product {sorted(ours)}.")
        differences = {
            name: float((ours[name] * factor - theirs[name]).norm() / theirs[name].norm()) for name in theirs
        }
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= TOLERANCE:
            raise DisagreementError(
                f"{inputs.case.length} tokens: the gradients of {worst} differ by {differences[worst]:.1e}, "
                f"over {TOLERANCE}."
            )
        return differences[worst]


def require_close(what: str, ours: float, theirs: float) -> float:
    """The relative difference.

    Raises:
        DisagreementError: it exceeds TOLERANCE.
    """
    difference = abs(ours - theirs) / abs(theirs)
    if not difference <= TOLERANCE:
        raise DisagreementError(f"{what} is {ours} here and {theirs} in the other package.")
    return difference


def too_large(last: Row | None, case: StepCase) -> str | None:
    """Why the other side cannot be run, judged by what it took for the case before; its bytes grow at most
    with the square of the length, and with the anchors.
    """
    if last is None or last.case.drawn != case.drawn:
        return None
    if last.theirs is None:
        return last.missing if case.length >= last.case.length else None
    growth = (case.length / last.case.length) ** 2
    if case.anchors is not None and last.case.anchors is not None:
        # Rows of blocks see the context and all blocks.
        growth = max(case.length / last.case.length, 1.0) * max(case.anchors / last.case.anchors, 1.0) ** 1.5
    expected, free = last.theirs.peak_bytes * growth, free_memory()
    if expected <= _MEMORY_SHARE * free:
        return None
    return f"needs about {expected / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def run(
    pair: Pair,
    sizes: Sizes,
    cases: Sequence[StepCase],
    rounds: int,
    activation: str,
    python: str,
    threads: int,
    choose_at: int = _CHOOSE_AT,
) -> tuple[list[Row], dict[str, Any]]:
    """Measure one pair. Returns the rows and the record that goes to the JSON."""
    at = StepCase(choose_at, cases[0].anchors)
    rows = []
    with TemporaryDirectory() as made, Peer(python, pair.package, threads, Path(made, "log")) as peer:
        versions = peer.ask("versions")
        comparison = Comparison(pair, sizes, activation, peer, Path(made), at)
        for row in comparison.rows(cases, rounds):
            rows.append(row)
            theirs = f"{row.theirs.seconds:.2f} s" if row.theirs else row.missing
            print(f"{described(row)}: {row.ours.seconds:.2f} s, {pair.package} {theirs}", flush=True)
    record = {
        **asdict(pair),
        "versions": versions,
        "differences": DIFFERENCES[pair],
        "attention": {"seconds": comparison.forms, "tokens": choose_at, "chosen": comparison.form},
        "kernel": comparison.ours.trainer.kernel_name,
        "largest_gradient_difference": comparison.gradient_difference,
        "rows": [row.as_dict() for row in rows],
    }
    return rows, record


def described(row: Row) -> str:
    case = row.case
    what = f"{case.anchors} anchors" if case.anchors is not None else "all guesses"
    return f"{row.pair.algorithm}, {case.length} tokens, {'guesses drawn' if case.drawn else what}"


def show(rows: Sequence[Row]) -> None:
    """The table."""

    def cells(row: Row) -> tuple[object, ...]:
        theirs = row.theirs
        return (
            described(row),
            row.pair.package,
            f"{row.ours.seconds:.2f}",
            f"{theirs.seconds:.2f}" if theirs else None,
            f"{row.faster:.1f}" if row.faster else row.missing,
            f"{row.ours.peak_bytes / 1e6:.0f}",
            f"{theirs.peak_bytes / 1e6:.0f}" if theirs else None,
            f"{row.smaller:.1f}" if row.smaller else None,
            f"{row.difference:.0e}" if row.difference is not None else None,
        )

    columns = (
        "step",
        "beside",
        "s",
        "its s",
        "times faster",
        "MB",
        "its MB",
        "times smaller",
        "losses apart",
    )
    print_table("one training step, forward and backward", columns, map(cells, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    sizes, rows, records = Sizes(), [], []
    for pair in PAIRS:
        if pair.algorithm in options.algorithms:
            cases = cases_of(pair, options.lengths, options.anchors)
            job = (pair, sizes, cases, options.rounds, options.activation, options.python, options.threads)
            ((found, record),) = run_ranks(1, run, *job, timeout=_PATIENCE, threads=options.threads)
            rows += found
            records.append(record)
    show(rows)
    body = {
        "timed": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "sizes": asdict(sizes),
        "activation": options.activation,
        "rounds": options.rounds,
        "pairs": records,
    }
    command = " ".join(("python -m benchmarks.block_step", *arguments))
    print(write_result("block_step", command, body, options.folder, options.threads))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_step", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L")
    parser.add_argument("--anchors", type=int, nargs="+", default=ANCHORS, metavar="N", help="of DFlash")
    parser.add_argument("--algorithms", nargs="+", choices=("dflash", "peagle"), default=("dflash", "peagle"))
    parser.add_argument("--rounds", type=int, default=3, help="alternations per case; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--activation", default="recompute", help="train.activation of the recipe")
    parser.add_argument("--python", help="with the other packages; default: make_environment.sh's")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    least = min(*options.lengths, *options.anchors, options.rounds, options.threads)
    if least < 1:
        parser.error("--lengths, --anchors, --rounds and --threads must be positive.")
    room = min(*options.lengths, _CHOOSE_AT) - Sizes().block
    if max(options.anchors) > room:
        parser.error(
            f"--anchors {max(options.anchors)}: a document of {room + Sizes().block} tokens has room for "
            f"{room}. Give fewer."
        )
    options.python = options.python or _cached_python(parser)
    if not os.access(options.python, os.X_OK):
        parser.error(f"--python {options.python} is no program. Name a Python that has the other packages.")
    return options


def _cached_python(parser: argparse.ArgumentParser) -> str:
    script = REPOSITORY / "tests" / "served" / "make_environment.sh"
    where = Path(
        subprocess.run([script, "--where"], text=True, capture_output=True, check=True).stdout.strip()
    )
    if not (where / "complete").is_file():
        parser.error(f"no environment in {where}. Run {script} once, or name a Python by --python.")
    return str(where / "bin" / "python")


if __name__ == "__main__":
    sys.exit(main())
