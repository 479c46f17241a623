"""`python -m judge.order`: proves that whole training runs in small cannot come to a deadlock under NCCL.

Each case trains two optimizer steps of two micro-batches with the product's loop on gloo ranks: start,
comparison of the replicas, held-out evaluation, a checkpoint after each step, the final weights, and loading
the checkpoint again. Every rank's order of torch.distributed operations is recorded, over all groups, and
`operation_order.order_fault` judges them. Prints a line per case and writes benchmarks/results/order.json
(order_matrix.json); the exit status is 1 when a fault is found. `--matrix` takes the cases of the exactness
matrix that have several ranks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.attention.prefix_kv import PrefixKV
from eagle3_ds.checkpoint.format import CHECKPOINTS, latest
from eagle3_ds.checkpoint.restore import load_checkpoint
from eagle3_ds.guard.heart import Heart
from eagle3_ds.guard.stop import StopRequest
from eagle3_ds.layout import PackedSequence
from eagle3_ds.train.loop import run_training
from eagle3_ds.train.state import EngineState
from judge.cases import Case, full_matrix, make_inputs
from judge.operation_order import Orders, order_fault
from judge.order_record import OrderRecord, read_orders
from judge.product import as_pack, make_trainer
from judge.ranks import RankFailure, run_ranks
from judge.result_file import FOLDER, write_result

STEPS = 2
# The documents of most cases leave one rank without an answer.
_BASE = Case(accumulation=2, documents="unsupervised_rank")
CASES = (
    replace(_BASE, ulysses=2, deepspeed="zero1"),
    replace(_BASE, ring=2, deepspeed="zero2", kv_exchange="ring", activation="offload"),
    replace(_BASE, ring=2, deepspeed="zero3", zero_group="draft_dp", algorithm="dflash", kv_exchange="ring"),
    replace(_BASE, ring=2, ulysses=2, deepspeed="zero3", layers=2, kv_exchange="ring_kept"),
    replace(_BASE, ring=2, ulysses=2, deepspeed="zero1", algorithm="dflash", documents="many_unaligned"),
    replace(_BASE, draft_dp=2, ulysses=2, deepspeed="zero1", zero_group="draft_dp", algorithm="peagle"),
    replace(_BASE, draft_dp=2, ring=2, deepspeed="zero3", zero_group="draft_dp", kv_exchange="ring"),
    replace(_BASE, draft_dp=2, ring=2, deepspeed="zero2", zero_group="draft_dp", documents="answers"),
    replace(_BASE, ring=4, deepspeed="zero0", algorithm="peagle", kv_exchange="ring_kept"),
    replace(_BASE, draft_dp=2, ring=2, ulysses=2, deepspeed="zero2", kv_exchange="ring", dtype="bfloat16"),
    replace(_BASE, draft_dp=2, ring=2, ulysses=2, deepspeed="zero3", zero_group="draft_dp", ttt_steps=7),
)


@dataclass(frozen=True)
class Packs:
    """A loader of packs that are there already; `steps[s]` are those of optimizer step s."""

    steps: Sequence[list[PackedSequence]]

    def steps_in(self, epochs: int) -> int:
        return epochs * len(self.steps)

    def packs_before(self, step: int) -> int:
        return sum(map(len, self.steps[:step]))

    def step(self, index: int) -> list[PackedSequence]:
        return self.steps[index]

    def documents(self, step: int) -> list[int]:
        return []

    def document(self, step: int, place: int) -> PackedSequence:
        raise IndexError("no step of these is skipped")

    def pack_indices(self, index: int) -> list[int]:
        # The loop asks for those after the last step too.
        return [index]


@dataclass(frozen=True)
class Verdict:
    """What the orders of a case come to.

    Attributes:
        operations: of all ranks, by kind.
        communicators: groups that were used.
        empty: operations that sent or received no element.
        fault: what was found; None when every order runs to its end.
    """

    case: Case
    operations: dict[str, int]
    communicators: int
    empty: int
    fault: str | None

    def line(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.operations.items()))
        state = "ok  " if self.fault is None else "FAIL"
        return f"{state} {self.case}: {self.communicators} groups, {counts}" + (
            f"\n     {self.fault}" if self.fault else ""
        )

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "case": str(self.case)}


def judge_order(case: Case, fault: str | None = None, timeout: float = 240.0) -> Verdict:
    """Train a case and judge the orders of its ranks, as far as they came.

    Args:
        fault: one of FAULTS, put into the step.
        timeout: seconds until ranks that do not end are taken to hang.
    """
    with tempfile.TemporaryDirectory(prefix="order-") as name:
        folder, failure = Path(name), None
        try:
            run_ranks(case.world_size, train_recorded, case, folder, fault, timeout=timeout)
        except RankFailure as error:
            failure = str(error)
        return judged(case, read_orders(folder, case.world_size), failure)


def judged(case: Case, orders: Orders, failure: str | None) -> Verdict:
    """The verdict on what the ranks of a case recorded; `failure`: how the run failed, None if it did not."""
    silent = [rank for rank in range(case.world_size) if not orders.get(rank)]
    unrecorded = f"ranks {silent} recorded no operation" if silent else None
    everything = [operation for order in orders.values() for operation in order]
    return Verdict(
        case,
        dict(Counter(operation.kind for operation in everything)),
        len({(operation.communicator, operation.group) for operation in everything}),
        sum(not amount for operation in everything for _, amount in operation.amounts),
        order_fault(orders) or failure or unrecorded,
    )


def train_recorded(case: Case, folder: Path, fault: str | None) -> None:
    """One rank's run, its order recorded in `folder`. Collective over the case's world."""
    with OrderRecord(folder, dist.get_rank()), FAULTS[fault]() if fault else nullcontext():
        torch.manual_seed(0)
        inputs = make_inputs(case)
        trainer = make_trainer(case, inputs)
        often = {"steps": STEPS, "eval_every": 1, "save_every": 1, "save_async": True}
        train = trainer.recipe.train.model_copy(update=often)
        trainer.recipe = trainer.recipe.model_copy(update={"train": train})
        place = trainer.topology.place.dp_rank
        *steps, heldout = (
            [as_pack(batch, inputs.frozen) for batch in step[place]] for step in inputs.steps[: STEPS + 1]
        )
        run_training(trainer, Packs(steps), heldout, folder, StopRequest(), Heart(None))
        load_checkpoint(EngineState(trainer), latest(folder / CHECKPOINTS))


@contextmanager
def _nothing_to_sum() -> Iterator[None]:
    """A rank whose queries give no gradient to keys takes no part in the keys' sum over the ring."""
    take = PrefixKV.take_gradients

    def without_the_others(self: PrefixKV) -> tuple[Tensor, Tensor]:
        assert self.dk is not None and self.dv is not None
        if self.dk.any() or self.dv.any():
            return take(self)
        columns = len(self.dk) // self.plan.ring
        return self.dk[:columns], self.dv[:columns]

    with mock.patch.object(PrefixKV, "take_gradients", without_the_others):
        yield


FAULTS = {"nothing_to_sum": _nothing_to_sum}
"""Put on purpose into a step, so that its ranks hang."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", action="store_true", help="the cases of the exactness matrix")
    options = parser.parse_args(arguments)
    cases = [case for case in full_matrix() if case.world_size > 1] if options.matrix else CASES
    verdicts = []
    for case in cases:
        verdicts.append(judge_order(case))
        print(verdicts[-1].line(), flush=True)
    command = "python -m judge.order" + (" --matrix" if options.matrix else "")
    name = "order_matrix" if options.matrix else "order"
    path = write_result(name, command, {"cases": [verdict.as_dict() for verdict in verdicts]}, FOLDER)
    failed = sum(verdict.fault is not None for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} cases run to their end; {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
