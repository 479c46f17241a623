"""Steps that are not finite are skipped by all ranks, exactly; what all hold is compared bit by bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ds.guard import identity
from eagle3_ds.guard.divergence import DivergenceGuard
from eagle3_ds.guard.replicas import require_same_replicas, weights_compared_before_update
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.trainer import DraftTrainer, StepReport
from judge.cases import Case, make_inputs
from judge.product import as_pack, make_recipe, make_trainer
from judge.ranks import RankPools

pytestmark = pytest.mark.ranks
CASE = Case(ulysses=2, accumulation=2)
BAD_DOCUMENT = 1


@dataclass(frozen=True)
class Packs:
    """A loader of packs that are there already."""

    steps: list[list[PackedSequence]]

    def step(self, index: int) -> list[PackedSequence]:
        return self.steps[index]

    def documents(self, step: int) -> list[int]:
        return list(range(sum(len(pack.lengths) for pack in self.steps[step])))

    def document(self, step: int, place: int) -> PackedSequence:
        places = [
            (pack, end - length, end)
            for pack in self.steps[step]
            for length, end in zip(pack.lengths, accumulate(pack.lengths), strict=True)
        ]
        pack, start, end = places[place]
        columns = {
            name: getattr(pack, name)[start:end]
            for name in ("token_ids", "loss_mask", "teacher_token", "aux", "teacher")
        }
        return PackedSequence(lengths=(end - start,), **columns)

    def pack_indices(self, index: int) -> list[int]:
        return [2 * index, 2 * index + 1]


def prepared(case: Case) -> tuple[DraftTrainer, Packs]:
    torch.manual_seed(0)
    inputs = make_inputs(case, seed=0)
    trainer = make_trainer(case, inputs)
    rank = trainer.topology.place.dp_rank
    return trainer, Packs([[as_pack(batch, inputs.frozen) for batch in step[rank]] for step in inputs.steps])


def harmed(packs: list[PackedSequence], harm: str) -> list[PackedSequence]:
    """The packs of a step with one document whose hidden states are not finite, or so large that only the
    gradient is not.
    """
    first, *others = packs
    start = sum(first.lengths[:BAD_DOCUMENT])
    rows = slice(start, start + first.lengths[BAD_DOCUMENT])
    aux = first.aux[:].clone()
    aux[rows] = {"nan": math.nan, "infinite": math.inf}[harm]
    return [replace(first, aux=aux), *others]


def train_past_a_bad_step(
    case: Case, harm: str | None, folder: Path
) -> tuple[list[StepReport], list[bool], dict[str, torch.Tensor]]:
    """Step 0, step 1 with harm (left out when None), step 2; reports, what the guard said, the weights."""
    trainer, packs = prepared(case)
    if harm is None:
        packs.steps.pop(1)
    else:
        packs.steps[1] = harmed(packs.steps[1], harm)
    guard = DivergenceGuard(trainer, packs, folder, max_skipped=1)
    reports, skipped = [], []
    for index, step in enumerate(packs.steps):
        reports.append(trainer.step(step))
        skipped.append(guard.skipped(index, reports[-1]))
    return reports, skipped, trainer.state_dict()


@pytest.mark.parametrize(
    ("deepspeed", "dtype", "zero_group", "harm"),
    [
        ("zero0", "float32", "all", "nan"),
        ("zero0", "bfloat16", "all", "infinite"),
        ("zero1", "float32", "draft_dp", "infinite"),
        ("zero2", "bfloat16", "all", "nan"),
        ("zero2", "float32", "all", "nan"),
        ("zero3", "float32", "draft_dp", "nan"),
        ("zero3", "bfloat16", "all", "infinite"),
        ("zero3_offload", "float32", "all", "nan"),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    deepspeed: str, dtype: str, zero_group: str, harm: str, run_ranks: RankPools, tmp_path: Path
) -> None:
    case = replace(CASE, deepspeed=deepspeed, dtype=dtype, zero_group=zero_group)
    expected = run_ranks(2, train_past_a_bad_step, case, None, tmp_path)
    for (reports, skipped, weights), (_, _, clean) in zip(
        run_ranks(2, train_past_a_bad_step, case, harm, tmp_path), expected, strict=True
    ):
        assert skipped == [False, True, False]
        assert not math.isfinite(reports[1].loss)
        for name, weight in weights.items():
            assert torch.equal(weight, clean[name]), name
    saved = sorted(path.name for path in (tmp_path / "divergence").iterdir())
    assert saved == [f"step-000002_document-{BAD_DOCUMENT}.safetensors"]
    document = load_file(tmp_path / "divergence" / saved[0])
    # It is too short for the later steps.
    assert document["bad_ttt_steps"].tolist() == [0]
    assert len(document["token_ids"]) == len(document["loss_mask"]) > 0


def diverge(case: Case, folder: Path) -> str:
    """What the guard says in the end. Returned, not raised: ranks that raise are not used again."""
    trainer, packs = prepared(case)
    packs.steps[:] = [harmed(packs.steps[0], "nan")] * 3
    guard = DivergenceGuard(trainer, packs, folder, max_skipped=2)
    for index in range(2):
        assert guard.skipped(index, trainer.step(packs.steps[index]))
    with pytest.raises(FloatingPointError) as stop:
        guard.skipped(2, trainer.step(packs.steps[2]))
    return str(stop.value)


def test_too_many_in_a_row_end_the_run_and_name_the_document(run_ranks: RankPools, tmp_path: Path) -> None:
    for message in run_ranks(2, diverge, CASE, tmp_path):
        assert message.startswith("the loss of step 3 is not finite at TTT steps [0, 1, 2]")
        assert (
            f"document {BAD_DOCUMENT} at TTT steps [0, 1, 2], its hidden states are not finite either"
            in message
        )
        assert "the 3. in a row, and faults.max_skipped is 2" in message


def harm_rank_1(
    case: Case, what: str, folder: Path
) -> tuple[bool, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of gradient and total loss, one is not finite, and on one rank only."""
    trainer, packs = prepared(case)
    before = trainer.state_dict()
    if trainer.topology.place.rank == 1:
        module = trainer.engine.module
        if what == "gradient":
            next(iter(module.parameters())).register_hook(lambda gradient: gradient * math.inf)
        else:
            module.register_forward_hook(lambda _, __, loss: loss._replace(total=loss.total + math.inf))
    guard = DivergenceGuard(trainer, packs, folder, max_skipped=1)
    report = trainer.step(packs.steps[0])
    assert math.isfinite(report.loss)
    return guard.skipped(0, report), before, trainer.state_dict()


@pytest.mark.parametrize(
    ("what", "deepspeed"), [("gradient", "zero0"), ("gradient", "zero3"), ("loss", "zero2")]
)
def test_one_of_loss_and_gradient_on_one_rank_is_enough(
    what: str, deepspeed: str, run_ranks: RankPools, tmp_path: Path
) -> None:
    for skipped, before, after in run_ranks(
        2, harm_rank_1, replace(CASE, deepspeed=deepspeed), what, tmp_path
    ):
        assert skipped
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    # Nobody is to blame, so every document of the step is there to be looked at.
    assert len(list((tmp_path / "divergence").iterdir())) == len(prepared_documents())


def prepared_documents() -> list[int]:
    inputs = make_inputs(CASE, seed=0)
    return [length for batch in inputs.steps[0][0] for length in batch.lengths]


# Replicas


def drift(case: Case, what: str) -> str:
    """Rank 1 drifts in one respect; then all compare, and tell what they found."""
    trainer, packs = prepared(case)
    trainer.step(packs.steps[0])
    require_same_replicas(trainer, packs, 1)
    if trainer.topology.place.rank == 1:
        parameter = list(trainer.engine.module.parameters())[-1]
        if what == "weights":
            held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            # The lowest bit of one word.
            held.detach().view(-1)[:1].view(torch.int32).add_(1)
        elif what == "frozen tensors":
            trainer.frozen_tensors()[0][0, 0] += 1
        elif what == "random state":
            torch.rand(1)
        elif what == "next packs":
            packs = replace(packs)
            object.__setattr__(packs, "pack_indices", lambda index: [0, 1])
    try:
        require_same_replicas(
            trainer, packs, 2 if what == "place in the data" and trainer.topology.place.rank else 1
        )
    except RuntimeError as error:
        return str(error)
    return "all the same"


@pytest.mark.parametrize(
    ("what", "deepspeed", "zero_group"),
    [
        ("weights", "zero0", "all"),
        ("weights", "zero2", "draft_dp"),
        ("weights", "zero3", "draft_dp"),
        ("frozen tensors", "zero3", "all"),
        ("random state", "zero2", "all"),
        ("next packs", "zero2", "all"),
        ("place in the data", "zero2", "all"),
    ],
)
def test_a_drifted_rank_is_found(what: str, deepspeed: str, zero_group: str, run_ranks: RankPools) -> None:
    case = replace(CASE, deepspeed=deepspeed, zero_group=zero_group)
    for message in run_ranks(2, drift, case, what):
        assert f"do not hold the same {what}: it differs between ranks [0] and [1]" in message


def drift_before_a_step(
    case: Case, what: str
) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rank 1 has a wrong weight in the second step: what is said before the update, and the weights before
    and after it.
    """
    trainer, packs = prepared(case)
    trainer.step(packs.steps[0])
    before = trainer.state_dict()
    if what == "weights" and trainer.topology.place.rank == 1:
        parameter = list(trainer.engine.module.parameters())[-1]
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        held.detach().view(-1)[:1].view(torch.int32).add_(1)
    try:
        with weights_compared_before_update(trainer, 1):
            trainer.step(packs.steps[1])
    except RuntimeError as error:
        return str(error), before, trainer.state_dict()
    # Once is enough: this step, whose weights nobody compares, is not about them.
    trainer.step(packs.steps[2])
    return "all the same", before, trainer.state_dict()


@pytest.mark.parametrize(
    ("deepspeed", "zero_group"),
    [("zero0", "all"), ("zero1", "draft_dp"), ("zero2", "all"), ("zero2", "draft_dp"), ("zero3", "draft_dp")],
)
@pytest.mark.parametrize("what", ["weights", "nothing"])
def test_a_wrong_weight_is_found_before_the_update_hides_it(
    what: str, deepspeed: str, zero_group: str, run_ranks: RankPools
) -> None:
    case = replace(CASE, deepspeed=deepspeed, zero_group=zero_group)
    results = run_ranks(2, drift_before_a_step, case, what)
    for message, before, after in results:
        if what == "nothing":
            assert message == "all the same" and any(
                not torch.equal(weight, after[name]) for name, weight in before.items()
            )
        else:
            assert "do not hold the same weights: it differs between ranks [0] and [1]" in message
    if what == "weights":
        _, before, after = results[0]
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1", "zero2", "zero3"])
def test_ranks_that_are_well_agree(deepspeed: str, run_ranks: RankPools) -> None:
    case = replace(CASE, deepspeed=deepspeed, zero_group="draft_dp")
    assert run_ranks(2, drift, case, "nothing") == ["all the same"] * 2


# Identity


def meet(identities: list[dict[str, str]]) -> str:
    recipe = make_recipe(CASE)
    topology = maybe_setup_distributed(ulysses=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "own_identity", lambda _: identities[topology.place.rank])
        try:
            identity.require_same_identity(recipe, topology)
        except ValueError as error:
            return str(error)
    return "alike"


def test_ranks_that_are_not_alike_say_so_at_start(run_ranks: RankPools) -> None:
    one = {"host": "host-a", "torch": "2.13.0", "data": "0123"}
    other = {"host": "host-b", "torch": "2.11.0", "data": "0123"}
    for message in run_ranks(2, meet, [one, other]):
        assert (
            "torch: 2.13.0 on ranks [0] (host-a); 2.11.0 on ranks [1] (host-b). Install the same torch"
            in message
        )
        assert "data" not in message
    assert run_ranks(2, meet, [one, {**one, "host": "host-b"}]) == ["alike"] * 2
