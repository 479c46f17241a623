"""Small whole training runs issue their operations in orders that cannot come to a deadlock under NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from judge.cases import Case
from judge.operation_order import order_fault
from judge.order import CASES, judge_order, judged
from judge.order_record import OrderRecord, read_orders
from judge.ranks import RankPools

pytestmark = pytest.mark.ranks
# All of CASES: `python -m judge.order`.
SHORT = CASES[1:4] + CASES[5:6]


def test_the_cases_have_every_mesh_stage_and_algorithm() -> None:
    assert {(case.draft_dp, case.ring, case.ulysses) for case in CASES} >= {
        (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2),
    }  # fmt: skip
    assert {case.algorithm for case in CASES} == {"eagle3", "peagle", "dflash"}
    assert {(case.deepspeed, case.zero_group) for case in CASES} >= {
        (f"zero{stage}", group) for stage in (1, 2, 3) for group in ("all", "draft_dp")
    }
    assert {case.kv_exchange for case in CASES} == {"gather", "ring", "ring_kept"}
    assert {case.accumulation for case in CASES} == {2}


def test_the_short_ones_have_every_algorithm_exchange_stage_and_zero_group() -> None:
    assert {case.algorithm for case in SHORT} == {"eagle3", "peagle", "dflash"}
    assert {case.kv_exchange for case in SHORT} == {"gather", "ring", "ring_kept"}
    assert {case.deepspeed for case in SHORT} == {"zero1", "zero2", "zero3"}
    assert {case.zero_group for case in SHORT} == {"all", "draft_dp"}
    assert all(max(getattr(case, axis) for case in SHORT) > 1 for axis in ("draft_dp", "ring", "ulysses"))


def test_a_rank_without_a_record_is_no_proof() -> None:
    case = Case(ring=2)
    assert judged(case, {0: [], 1: []}, None).fault == "ranks [0, 1] recorded no operation"
    assert judged(case, {0: []}, "rank 1 died").fault == "rank 1 died"


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_run_cannot_deadlock(case: Case) -> None:
    verdict = judge_order(case)
    assert verdict.fault is None
    # Sums of the report, and the start of DeepSpeed: an empty record would prove nothing.
    assert verdict.operations["all_reduce"] > 10 * case.world_size
    assert verdict.communicators > 1
    assert ("send" in verdict.operations) == (case.kv_exchange != "gather")
    assert ("all_to_all" in verdict.operations) == (case.ulysses > 1)


def test_a_rank_without_an_answer_that_skips_a_sum_is_found() -> None:
    case = Case(ring=2, accumulation=2, documents="unsupervised_rank")
    assert judge_order(case).fault is None
    verdict = judge_order(case, "nothing_to_sum", timeout=12.0)
    assert verdict.fault is not None
    waits, skipped = verdict.fault.split("; ")
    assert "rank 0 issued all_reduce float32" in waits and waits.endswith("which rank 1 did not")
    assert "rank 1 issued reduce_scatter float32" in skipped and skipped.endswith("which rank 0 did not")


def issue_every_kind(folder: Path) -> None:
    rank = dist.get_rank()
    other = 1 - rank
    with OrderRecord(folder, rank):
        dist.broadcast(torch.zeros(3), src=1)
        dist.reduce(torch.zeros(3), dst=1)
        # Rank 0 sends nothing to itself and two rows to rank 1, which sends none back.
        sent, received = [[0, 2], [0, 0]][rank], [[0, 0], [2, 0]][rank]
        dist.all_to_all_single(torch.zeros(sum(received), 5), torch.zeros(sum(sent), 5), received, sent)
        ends: list[Any] = [(dist.isend, torch.zeros(2)), (dist.irecv, torch.zeros(2))]
        for work in dist.batch_isend_irecv([dist.P2POp(op, tensor, other) for op, tensor in ends]):
            work.wait()
        dist.barrier()
        (dist.send if rank == 0 else dist.recv)(torch.zeros(1, dtype=torch.int64), other)


def test_roots_peers_batches_and_splits_are_recorded(run_ranks: RankPools, tmp_path: Path) -> None:
    run_ranks(2, issue_every_kind, tmp_path)
    orders = read_orders(tmp_path, 2)
    assert [operation.kind for operation in orders[0]] == [
        "broadcast", "reduce", "all_to_all", "send", "recv", "barrier", "send",
    ]  # fmt: skip
    broadcast, reduce, all_to_all, sent, received, _, alone = orders[0]
    assert broadcast.root == reduce.root == 1
    assert all_to_all.splits == ((0, 2), (0, 0))
    assert orders[1][2].splits == ((0, 0), (2, 0))
    assert sent.batch == received.batch == 0
    assert (alone.batch, alone.peer, alone.tensors) == (None, 1, (("int64", (1,)),))
    assert {operation.group for order in orders.values() for operation in order} == {(0, 1)}
    assert order_fault(orders) is None
