"""`python -m judge.exactness`: compares the parallel product with the dense reference in one process.

Each case trains NUM_STEPS optimizer steps with both, the product on CPU ranks, or with `--device cuda` on one
GPU, where every case has one rank. It prints the relative errors of each case, and writes them to
benchmarks/results/exactness.json (exactness_cuda.json). The exit status is 1 when any case exceeds its
tolerance (fp32 1e-5, bf16 2e-2).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.device.found import is_available
from eagle3_ds.device.kinds import CPU, KINDS
from judge.cases import OPTIMIZATION, Case, full_matrix, make_inputs, on_one_device, short_matrix
from judge.dense_reference import Guesses, StepResult, reference_train, unroll
from judge.dflash_reference import block_guesses
from judge.peagle_reference import peagle_guesses
from judge.product import ProductResult, run_case
from judge.ranks import run_ranks
from judge.result_file import FOLDER, write_result

REFERENCES: Mapping[str, Guesses] = {
    "eagle3": unroll,
    "peagle": peagle_guesses,
    "dflash": block_guesses,
}
"""The arithmetic of each algorithm, written from its own page."""
COMPARED = (
    "loss",
    "step_loss",
    "accuracy",
    "tau",
    "acceptance_length",
    "clip_norm",
    "gradients",
    "weights",
)


@dataclass(frozen=True)
class Verdict:
    """The result of one case.

    Attributes:
        errors: for each of COMPARED the largest relative error over all steps; of gradients and weights, the
            largest relative L2 error of a parameter.
        worst: the parameters with the largest gradient error and with the largest weight error.
        ranks_agree: whether all ranks have the same reports and bitwise the same weights.
        failure: the traceback when the product failed to run.
    """

    case: Case
    errors: dict[str, float]
    worst: dict[str, str]
    ranks_agree: bool
    seconds: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        # `not <=` and not `>`: NaN must fail.
        return (
            self.failure is None
            and self.ranks_agree
            and all(e <= self.case.tolerance for e in self.errors.values())
        )

    def line(self) -> str:
        state = "ok  " if self.passed else "FAIL"
        if self.failure is not None:
            return f"{state} {self.case}: {self.failure.strip().splitlines()[-1]}"
        errors = " ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        agreement = "" if self.ranks_agree else " RANKS DIFFER"
        return f"{state} {self.case}: {errors}{agreement} ({self.seconds:.1f} s)"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tolerance": self.case.tolerance, "passed": self.passed}


def judge(case: Case, seed: int = 0, mutation: str | None = None, device: str = "cpu") -> Verdict:
    """Run one case with the product on `device` and with the reference, and compare.

    Args:
        mutation: a deliberate fault in the product (`judge.mutations`); None for none.
    """
    started = time.perf_counter()
    try:
        ranks: list[ProductResult] = run_ranks(case.world_size, run_case, case, seed, mutation, device=device)
    except RuntimeError as error:
        return Verdict(case, {}, {}, False, time.perf_counter() - started, failure=str(error))
    inputs = make_inputs(case, seed)
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    expected, trained = reference_train(
        weights,
        inputs.config,
        inputs.frozen,
        inputs.step_batches(),
        case.rules,
        OPTIMIZATION,
        case.tolerance,
        # fp32 is compared with weights that nothing rounds.
        torch.bfloat16 if case.dtype == "bfloat16" else None,
        REFERENCES[case.algorithm],
    )
    errors, worst = compare(ranks[0], expected, trained)
    agree = all(r.weights_digest == ranks[0].weights_digest and r.reports == ranks[0].reports for r in ranks)
    return Verdict(case, errors, worst, agree, time.perf_counter() - started)


def compare(
    product: ProductResult, expected: Sequence[StepResult], trained: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, str]]:
    """The relative errors by the names of COMPARED, and the parameters with the largest ones."""

    pairs = list(zip(product.reports, expected, strict=True))

    def over_steps(of_product: Callable[[Any], Any], of_reference: Callable[[StepResult], Any]) -> float:
        return _largest(relative_error(of_product(report), of_reference(result)) for report, result in pairs)

    gradient_errors = _by_parameter(
        (name, gradients[name], result.gradients[name])
        for gradients, result in zip(product.gradients, expected, strict=True)
        for name in _same_names(gradients, result.gradients)
    )
    weight_errors = _by_parameter(
        (name, product.weights[name], trained[name]) for name in _same_names(product.weights, trained)
    )
    errors = {
        "loss": over_steps(lambda r: r.loss, lambda r: r.loss),
        "step_loss": over_steps(lambda r: r.step_loss, lambda r: r.step_loss),
        # Accuracies count argmaxes, so they must be equal except for near-ties, which the reference counts.
        "accuracy": _largest(
            relative_error(a, b, slack)
            for report, result in pairs
            for a, b, slack in zip(
                report.step_accuracy, result.step_accuracy, result.accuracy_slack, strict=True
            )
        ),
        "tau": _largest(relative_error(report.tau, result.tau, result.tau_slack) for report, result in pairs),
        "acceptance_length": over_steps(lambda r: r.acceptance_length, lambda r: r.acceptance_length),
        "clip_norm": over_steps(lambda r: r.grad_norm, lambda r: r.grad_norm),
        "gradients": _largest(gradient_errors.values()),
        "weights": _largest(weight_errors.values()),
    }
    assert tuple(errors) == COMPARED
    return errors, {"gradients": _worst(gradient_errors), "weights": _worst(weight_errors)}


def relative_error(value: Any, reference: Any, slack: float = 0.0) -> float:
    """|value - reference| / |reference| in L2. It is 0 when both are zero, and infinite when only the
    reference is. `slack` is subtracted from the difference before.
    """
    a, b = (torch.as_tensor(x).detach().double().reshape(-1) for x in (value, reference))
    if a.shape != b.shape:
        return math.inf
    difference, size = max(0.0, float((a - b).norm()) - slack), float(b.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def _by_parameter(rows: Any) -> dict[str, float]:
    """The largest relative error of each parameter. Rows: name, value, reference."""
    errors: dict[str, float] = {}
    for name, value, reference in rows:
        errors[name] = _largest((errors.get(name, 0.0), relative_error(value, reference)))
    return errors


def _same_names(product: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[str]:
    if product.keys() != reference.keys():
        raise ValueError(
            f"parameters differ: {sorted(product.keys() ^ reference.keys())} are on one side only."
        )
    return sorted(reference)


def _largest(errors: Any) -> float:
    """The maximum, with NaN as infinity; `max` may pass over a NaN."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _worst(errors: Mapping[str, float]) -> str:
    return max(errors, key=lambda name: errors[name])


def run_matrix(
    cases: Sequence[Case], seed: int, path: Path | None, command: str, device: str = "cpu", at_once: int = 1
) -> bool:
    """Run all cases, and print and write the result of each. Returns whether all passed.

    Args:
        path: of the results; None writes none. command: the command line, for that file.
        device: kind of device, of the product; the reference stays on the CPU.
        at_once: cases that run beside each other, each with processes of its own.
    """
    verdicts = []
    one = partial(judge, seed=seed, device=device)
    with ExitStack() as stack:
        if at_once > 1:
            # Spawned, because a process that has started torch's threads must not be forked.
            spawn = multiprocessing.get_context("spawn")
            workers = stack.enter_context(ProcessPoolExecutor(at_once, spawn, torch.set_num_threads, (1,)))
        for verdict in workers.map(one, cases) if at_once > 1 else map(one, cases):
            verdicts.append(verdict)
            print(f"[{len(verdicts)}/{len(cases)}] {verdict.line()}", flush=True)
            if path is not None:
                write_result(path.stem, command, _record(verdicts, len(cases), seed), path.parent)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} cases passed" + (f"; {path}" if path else ""))
    for verdict in failed:
        if verdict.failure is not None:
            print(f"\n{verdict.case}\n{verdict.failure}", file=sys.stderr)
    return not failed


def _record(verdicts: Sequence[Verdict], num_cases: int, seed: int) -> dict[str, Any]:
    by_dtype = {
        dtype: {name: _largest(v.errors[name] for v in ran) for name in COMPARED}
        for dtype in ("float32", "bfloat16")
        if (ran := [v for v in verdicts if v.case.dtype == dtype and v.failure is None])
    }
    return {
        "seed": seed,
        "cases": num_cases,
        "judged": len(verdicts),
        "passed": sum(verdict.passed for verdict in verdicts),
        "largest_errors": by_dtype,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m judge.exactness", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="a few cases that show every value, at most 4 ranks"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where the result goes; needed to keep that of a part"
    )
    parser.add_argument("--device", choices=tuple(KINDS), default=CPU)
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="cases beside each other, on as many cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose printed line contains TEXT"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.device != CPU and not is_available(options.device):
        parser.error(f"no {options.device} device here.")
    cases = short_matrix() if options.short else full_matrix()
    if options.device != CPU:
        cases = on_one_device(cases)
    cases = [case for case in cases if options.only in str(case)]
    if not cases:
        parser.error(f"--only {options.only!r} matches no case.")
    # A part does not replace the record of all.
    whole = "exactness.json" if options.device == CPU else f"exactness_{options.device}.json"
    of_all = None if options.short or options.only else FOLDER / whole
    passed = run_matrix(
        cases,
        options.seed,
        options.json or of_all,
        " ".join(("python -m judge.exactness", *arguments)),
        options.device,
        options.at_once,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
