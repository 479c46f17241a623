"""The first step compares DeepSpeed's gradient with the sum of the ranks' own, and refuses another scale."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import deepspeed
import pytest
import torch

from eagle3_ds.layout import PackedSequence
from eagle3_ds.train.trainer import DraftTrainer
from judge.cases import HIDDEN, Case, make_inputs
from judge.collective_calls import CollectiveCalls
from judge.product import as_pack, make_trainer
from judge.ranks import RankPools

pytestmark = pytest.mark.ranks
TWO = Case(ulysses=2, accumulation=2, documents="unsupervised_rank")
FOUR = Case(draft_dp=2, ring=2, accumulation=2)
Steps = list[list[PackedSequence]]


def prepared(case: Case) -> tuple[DraftTrainer, Steps]:
    inputs = make_inputs(case)
    trainer = make_trainer(case, inputs)
    rank = trainer.topology.place.dp_rank
    return trainer, [[as_pack(batch, inputs.frozen) for batch in step[rank]] for step in inputs.steps]


def refusal(trainer: DraftTrainer, packs: list[PackedSequence]) -> str:
    """What a step is refused with. Returned, not raised: ranks that raise are not used again."""
    with pytest.raises(RuntimeError) as refused:
        trainer.step(packs)
    return str(refused.value)


def first_steps(case: Case) -> tuple[bool, bool, str]:
    """On every rank: whether the comparison is pending before and after the first step; and what is said when
    the loss is multiplied by twice the number.
    """
    trainer, steps = prepared(case)
    before = trainer.scale_check.pending
    trainer.step(steps[0])
    after = trainer.scale_check.pending
    wrong, _ = prepared(case)
    wrong.loss_scale *= 2
    return before, after, refusal(wrong, steps[0])


ALL_STAGES = [
    replace(base, deepspeed=f"zero{stage}", zero_group=zero_group)
    for base in (TWO, FOUR)
    for stage in range(4)
    for zero_group in ("all", "draft_dp")
]
OTHERS = [
    Case(accumulation=2),
    Case(deepspeed="zero0", dtype="bfloat16"),
    replace(TWO, deepspeed="zero0", dtype="bfloat16"),
    replace(TWO, deepspeed="zero1", dtype="bfloat16", algorithm="dflash"),
    replace(FOUR, deepspeed="zero2", dtype="bfloat16", algorithm="peagle", zero_group="draft_dp"),
    replace(FOUR, deepspeed="zero3", dtype="bfloat16"),
    replace(FOUR, deepspeed="zero3_hpz"),
    replace(TWO, deepspeed="zero3_offload"),
    # Its masks' rows get no gradient.
    replace(TWO, algorithm="peagle", ttt_steps=1),
]


@pytest.mark.parametrize("case", [*ALL_STAGES, *OTHERS], ids=str)
def test_the_right_scale_passes_at_once_and_twice_of_it_is_refused_by_all_ranks(
    run_ranks: RankPools, case: Case
) -> None:
    results = run_ranks(case.world_size, first_steps, case)
    assert [(before, after) for before, after, _ in results] == [(True, False)] * case.world_size
    (said,) = {refused for *_, refused in results}
    name = "layers.0.self_attn.k_norm.weight" if case.algorithm == "dflash" else "norm.weight"
    stage = case.deepspeed[len("zero") :][0]
    assert said.startswith(
        f"DeepSpeed {deepspeed.__version__} (ZeRO stage {stage}, parallel.zero_group {case.zero_group}, "
        f"parameter {name}) holds "
    )
    ratio = float(said.split(" holds ")[1].split()[0])
    assert ratio == pytest.approx(2, rel=1e-3 if case.dtype == "float32" else 5e-2)
    assert said.endswith(
        "Install the version of DeepSpeed in constraints.txt, and report this message as an issue."
    )


def without_averaging(case: Case) -> str:
    trainer, steps = prepared(case)
    trainer.engine.gradient_average = False
    return refusal(trainer, steps[0])


def test_a_deepspeed_that_sums_is_refused(run_ranks: RankPools) -> None:
    (said,) = set(run_ranks(4, without_averaging, replace(FOUR, deepspeed="zero0")))
    assert " holds 4 times the gradient" in said


def with_one_rank_apart(case: Case) -> str:
    """The gradients of rank 1 are three times those of the others once they have been averaged."""
    trainer, steps = prepared(case)
    compare = trainer.scale_check.compare

    def compare_apart(engine: object, loss_scale: float) -> None:
        if trainer.topology.place.rank == 1:
            for parameter in trainer.engine.module.parameters():
                parameter.grad.mul_(3)
        compare(engine, loss_scale)

    with mock.patch.object(trainer.scale_check, "compare", compare_apart):
        return refusal(trainer, steps[0])


def test_one_rank_with_another_gradient_is_refused_by_all(run_ranks: RankPools) -> None:
    (said,) = set(run_ranks(2, with_one_rank_apart, replace(TWO, deepspeed="zero0")))
    assert " holds 2 times the gradient" in said


def past_steps_that_tell_nothing(case: Case) -> tuple[list[bool], str]:
    """On every rank: whether the comparison is pending after a step without a supervised slot, after one that
    is not finite, and after a good one; and what a wrong scale is told in the step after such a one.
    """
    trainer, (packs, *_) = prepared(case)
    unsupervised = [replace(pack, loss_mask=torch.zeros_like(pack.loss_mask)) for pack in packs]
    harmed = [replace(pack, aux=torch.full_like(pack.aux[:], math.nan)) for pack in packs]
    pending = []
    for given in (unsupervised, harmed, packs):
        trainer.step(given)
        pending.append(trainer.scale_check.pending)
    wrong, _ = prepared(case)
    wrong.loss_scale /= 2
    wrong.step(unsupervised)
    return pending, refusal(wrong, packs)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_tells_nothing_is_passed_over(run_ranks: RankPools, stage: int) -> None:
    for pending, said in run_ranks(2, past_steps_that_tell_nothing, replace(TWO, deepspeed=f"zero{stage}")):
        assert pending == [True, True, False]
        assert " holds 0.5 times the gradient" in said


def sent_by_two_steps(case: Case) -> list[tuple[int, int]]:
    """On every rank: calls and bytes of the all-reduces of the first step and of the second."""
    trainer, steps = prepared(case)
    found = []
    for _ in range(2):
        with CollectiveCalls({}, everywhere=True) as calls:
            trainer.step(steps[0])
        count = calls.counts["world", "all_reduce"]
        found.append((count.calls, count.payload))
    return found


def test_it_costs_one_all_reduce_in_the_first_step_alone(run_ranks: RankPools) -> None:
    for first, second in run_ranks(2, sent_by_two_steps, replace(TWO, deepspeed="zero0")):
        assert first[0] - second[0] == 1
        assert first[1] - second[1] == 4 * (2 * HIDDEN + 1)
