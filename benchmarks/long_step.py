"""`python -m benchmarks.long_step`: one whole training step of 131,072 tokens in one packed row, judged.

Four CPU ranks (ring 2 x ulysses 2) train a small draft in fp32 under DeepSpeed, through the real batch path:
a row of several documents and a row of one, a quarter of the tokens supervised and all of them. Each step is
held against what the planner predicts (bytes of a rank; calls and bytes on the wire, exactly) and against an
fp64 reference at some hundred slots over the whole length (judge/sampled_reference.py): the loss of each
guess as the step itself computed it, and, in a step over the same row with these slots alone in the loss,
every figure of the report and every parameter's gradient. Exit status 1 when one of them is off.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.memory import TOLERANCE as BYTES_TOLERANCE
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.plan import attention_pairs, attention_traffic, predict_memory, step_flops
from judge.exactness import relative_error
from judge.long_run import LongRun, RankRecord, sample_mask, sampled_slots, take_steps
from judge.ranks import run_ranks
from judge.result_file import FOLDER, matmul_rate, print_table, write_result
from judge.sample_run import small_buckets
from judge.sampled_reference import SampledReference, SampledSlots, SampledStep

TOLERANCE = 1e-5
"""Largest relative difference between the step in fp32 and the reference in fp64."""
SHAPE = Eagle3Shape(64, 128, 4, 2, 16, 2048, 1024)
FIGURES = ("loss", "step_loss", "step_accuracy", "tau", "acceptance_length", "grad_norm")
PARTS = (0.37, 0.011, 0.23, 0.002, 0.19)
"""Of the length: the larger documents of the row of several. Two of 1 and 3 tokens and one of the rest
follow.
"""
FEWEST_SLOTS = 100
_PATIENCE = 6 * 3600.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What the reference gives for one row: with fp32 angles, as transformers rotates; and `exact_angles` how
    far fp64 angles are from it, as a relative difference of the sampled losses.
    """

    mask: NDArray[np.bool_]
    slots: SampledSlots
    step: SampledStep
    exact_angles: float
    seconds: float


def document_lengths(length: int) -> tuple[int, ...]:
    """Several documents, unaligned, of very different lengths."""
    large = [int(part * length) | 1 for part in PARTS]
    return (*large, 1, 3, length - sum(large) - 4)


def make_run(length: int, supervised: float, lengths: tuple[int, ...] | None, ulysses: int = 2) -> LongRun:
    deepspeed = small_buckets({"zero_optimization": {"stage": 2}}, 20_000)
    return LongRun(
        SHAPE,
        length,
        ttt_steps=3,
        ring=2,
        ulysses=ulysses,
        deepspeed=deepspeed,
        lengths=lengths,
        supervised=supervised,
    )


def expect(runs: Sequence[LongRun], clusters: int) -> Expected:
    """The reference for runs that differ in what they supervise alone."""
    started = time.perf_counter()
    run, mask = runs[0], sample_mask(runs, clusters)
    chosen = torch.from_numpy(sampled_slots(run, mask))
    fp32_frequency, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(run.config())
    batch = run.batch(torch.from_numpy(mask))
    model = run.model()
    weights = {name: weight.double() for name, weight in model.weights.items()}

    def reference(frequency: torch.Tensor | None) -> SampledReference:
        return SampledReference(weights, run.config(), model.frozen, batch, run.rules, chosen, frequency)

    rounded = reference(fp32_frequency)
    slots = rounded.compute()
    step = rounded.step(slots, batch.loss_mask)
    with torch.no_grad():
        exact = reference(None).compute()
    difference = relative_error(slots.value[slots.inside], exact.value[slots.inside])
    return Expected(mask, slots, step, difference, time.perf_counter() - started)


def machine_rate() -> float:
    """Of a matrix product of one process on all cores, in FLOPs per second."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    torch.set_num_threads(1)
    return rate


def judge_row(name: str, run: LongRun, expected: Expected) -> Row:
    """Train one run, and hold it against planner and reference. The rate of the machine is measured before
    and after it: other work on the machine slows either, and the better one counts.
    """
    before = machine_rate()
    ranks: list[RankRecord] = run_ranks(run.world_size, take_steps, run, expected.mask, timeout=_PATIENCE)
    rate = max(before, machine_rate())
    seconds = max(rank.seconds for rank in ranks)
    pairs = attention_pairs(run.setup(), run.lengths)
    flops = step_flops(run.setup(), pairs)
    needed = run.world_size * (flops.total - flops.recompute)
    row = {
        "name": name,
        "tokens": run.length,
        "documents": list(run.lengths or (run.length,)),
        "supervised": run.supervised,
        "bytes": bytes_of(run, ranks),
        "wire": wire_of(run, ranks),
        "sampled": errors_of_sampled(ranks[0], expected.step),
        "guesses": errors_of_guesses(run, ranks, expected.slots),
        "reports_agree": all(
            (rank.report, rank.sampled) == (ranks[0].report, ranks[0].sampled) for rank in ranks
        ),
        "report": ranks[0].report.as_dict(),
        "seconds": seconds,
        "tokens_per_second": run.length / seconds,
        "flops": needed,
        "matmul_rate": rate,
        "share_of_matmul_rate": needed / seconds / rate,
    }
    return {**row, "problems": problems(row)}


def bytes_of(run: LongRun, ranks: Sequence[RankRecord]) -> Row:
    """Counted (the largest rank's) beside predicted."""
    memory = predict_memory(run.setup())
    rest, peak = max(rank.rest for rank in ranks), max(rank.peak for rank in ranks)
    return {
        "counted": {"rest": rest, "peak": peak},
        "predicted": {"rest": memory.states, "peak": memory.peak, "phase": memory.phase},
        "ratio": {"rest": round(memory.states / rest, 4), "peak": round(memory.peak / peak, 4)},
    }


def wire_of(run: LongRun, ranks: Sequence[RankRecord]) -> Row:
    """Calls and payload over the axes of the sequence, of every rank beside the formula's."""
    predicted = {(t.axis, t.kind): (t.calls, t.payload) for t in attention_traffic(run.setup())}
    counted = [
        {key: value for key, value in rank.calls.items() if key[0] in ("ulysses", "ring")} for rank in ranks
    ]
    return {
        "predicted": _by_name(predicted),
        "counted": [_by_name(calls) for calls in counted],
        "zero_and_reports": _by_name({k: v for k, v in ranks[0].calls.items() if k[0] == "world"}),
        "equal": all(calls == predicted for calls in counted),
    }


def _by_name(counts: Mapping[tuple[str, str], tuple[int, int]]) -> dict[str, list[int]]:
    return {f"{axis} {kind}": list(value) for (axis, kind), value in sorted(counts.items())}


def errors_of_sampled(rank: RankRecord, expected: SampledStep) -> dict[str, float]:
    """Relative errors of the step with the sampled slots alone in the loss: its report, and the gradient of
    each parameter.
    """
    errors = {
        figure: relative_error(getattr(rank.sampled, figure), getattr(expected, figure)) for figure in FIGURES
    }
    if rank.gradients.keys() != expected.gradients.keys():
        raise ValueError(
            f"parameters differ: {sorted(rank.gradients.keys() ^ expected.gradients.keys())} are on one side."
        )
    for name, gradient in expected.gradients.items():
        errors[f"gradient of {name}"] = relative_error(rank.gradients[name], gradient)
    return errors


def errors_of_guesses(run: LongRun, ranks: Sequence[RankRecord], expected: SampledSlots) -> Row:
    """The guesses at sampled slots, as the whole step computed them, against the reference; and the sum of
    all guesses against the loss that the step reported.
    """
    steps, tapped = run.ttt_steps, [rank.guesses for rank in ranks]
    value, accepted = (np.full((steps, run.length), np.nan) for _ in range(2))
    owner = np.full(run.length, -1)
    contributing = np.zeros((steps, run.length), dtype=np.bool_)
    for number, guesses in enumerate(tapped):
        value[:, guesses.slots], accepted[:, guesses.slots] = guesses.value, guesses.accepted
        contributing[:, guesses.slots], owner[guesses.slots] = guesses.contributing, number
    slots = expected.slots.numpy()
    should = (expected.supervised(run.loss_mask(), run.rules.alignment) & expected.covered).numpy()
    counts = contributing.sum(1)
    mean = np.where(contributing, value, 0.0).sum(1) / np.maximum(counts, 1)
    checked = should & contributing[:, slots]
    theirs = {"value": expected.value.detach().numpy(), "accepted": expected.accepted.numpy()}
    errors = {
        name: np.abs(ours[:, slots] - theirs[name])[checked] / np.abs(theirs[name][checked])
        for name, ours in (("value", value), ("accepted", accepted))
    }
    checked_slots = slots[checked.any(0)]
    return {
        "slots": len(checked_slots),
        "guesses": int(checked.sum()),
        "slots_by_rank": np.bincount(owner[checked_slots], minlength=len(ranks)).tolist(),
        "first_and_last_slot": [int(checked_slots.min()), int(checked_slots.max())],
        "same_guesses_count": bool((should == contributing[:, slots]).all()),
        "largest_error_of_a_loss": float(errors["value"].max()),
        "error_of_losses": relative_error(value[:, slots][checked], theirs["value"][checked]),
        "error_of_acceptances": relative_error(accepted[:, slots][checked], theirs["accepted"][checked]),
        "error_of_the_reported_loss": relative_error(ranks[0].report.step_loss, mean),
    }


def problems(row: Row) -> list[str]:
    """What is off in a row, in words; empty when it passed. `not <=`, because NaN must fail."""
    found = [
        f"{of} bytes: predicted / counted is {ratio}"
        for of, ratio in row["bytes"]["ratio"].items()
        if not abs(ratio - 1) <= BYTES_TOLERANCE
    ]
    if not row["wire"]["equal"]:
        found.append("calls or bytes on the wire differ from the formula")
    guesses = row["guesses"]
    if not row["reports_agree"]:
        found.append("the ranks report different figures")
    if not guesses["same_guesses_count"]:
        found.append("other guesses are in the loss than the reference has in it")
    if min(guesses["slots_by_rank"]) == 0 or guesses["slots"] < FEWEST_SLOTS:
        found.append(f"too few sampled slots by rank: {guesses['slots_by_rank']}")
    errors = {name: error for name, error in guesses.items() if "error" in name}
    found += [
        f"{name}: {error:.1e}" for name, error in (errors | row["sampled"]).items() if not error <= TOLERANCE
    ]
    return found


def show(rows: Sequence[Row]) -> None:
    columns = (
        "row", "supervised", "s", "share of matmul rate", "peak MiB", "predicted", "wire", "slots checked",
        "largest loss error", "report", "gradients", "",
    )  # fmt: skip

    def cells(row: Row) -> tuple[object, ...]:
        gradients = [e for name, e in row["sampled"].items() if name.startswith("gradient")]
        peaks = (row["bytes"][of]["peak"] for of in ("counted", "predicted"))
        return (
            row["name"],
            f"{row['supervised']:.0%}",
            f"{row['seconds']:.1f}",
            f"{row['share_of_matmul_rate']:.0%}",
            *(f"{peak / 2**20:.1f}" for peak in peaks),
            "equal" if row["wire"]["equal"] else "DIFFERS",
            row["guesses"]["slots"],
            f"{row['guesses']['largest_error_of_a_loss']:.1e}",
            f"{max(row['sampled'][figure] for figure in FIGURES):.1e}",
            f"{max(gradients):.1e}",
            "FAIL" if row["problems"] else "ok",
        )

    print_table("one training step in one packed row, four ranks, fp32", columns, map(cells, rows))


def measure(
    length: int, shares: Sequence[float], clusters: int, path: Path, command: str, ulysses: int = 2
) -> list[Row]:
    """Judge every row, and write the file of results after each."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, lengths in (("documents", document_lengths(length)), ("one document", None)):
        runs = [make_run(length, share, lengths, ulysses) for share in shares]
        expected = expect(runs, clusters)
        print(f"{name}: {len(expected.slots.slots)} slots in fp64, {expected.seconds:.0f} s", flush=True)
        for run in runs:
            row = judge_row(name, run, expected)
            row["exact_angles"], row["reference_seconds"] = expected.exact_angles, expected.seconds
            rows.append(row)
            print(
                f"{name}, {run.supervised:.0%} supervised: {row['seconds']:.1f} s; "
                f"{'; '.join(row['problems']) or 'ok'}",
                flush=True,
            )
            write_result(path.stem, command, _record(rows, runs[0]), path.parent, threads=1)
    return rows


def _record(rows: Sequence[Row], run: LongRun) -> Row:
    return {
        "tolerance": TOLERANCE,
        "tolerance_of_bytes": BYTES_TOLERANCE,
        "shape": asdict(run.shape),
        "ring": run.ring,
        "ulysses": run.ulysses,
        "ttt_steps": run.ttt_steps,
        "deepspeed": run.deepspeed,
        "passed": sum(not row["problems"] for row in rows),
        "rows": list(rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_step", description=__doc__)
    parser.add_argument(
        "--tokens",
        type=int,
        default=131_072,
        metavar="L",
        help="below 12,288 the planner predicts more bytes than documents so short need",
    )
    parser.add_argument("--supervised", type=float, nargs="+", default=(0.25, 1.0), metavar="SHARE")
    parser.add_argument("--clusters", type=int, default=32, help="places in which slots are sampled")
    parser.add_argument("--ulysses", type=int, default=2, choices=(1, 2), help="the ring has two ranks")
    parser.add_argument("--output", type=Path, default=FOLDER / "long_step.json", metavar="PATH")
    options = parser.parse_args(arguments)
    if options.tokens < 2048:
        parser.error(f"--tokens {options.tokens}: give 2048 or more, four turns of a chat.")
    if not all(0 < share <= 1 for share in options.supervised):
        parser.error(f"--supervised {options.supervised}: give shares above 0 and up to 1.")
    command = " ".join(("python -m benchmarks.long_step", *arguments))
    rows = measure(
        options.tokens, options.supervised, options.clusters, options.output, command, options.ulysses
    )
    show(rows)
    failed = [row for row in rows if row["problems"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed; {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
