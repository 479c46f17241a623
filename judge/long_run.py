"""A whole training step over one long packed sequence on CPU ranks, with the loss of every guess tapped.

The same world takes two steps over the same rows. The first supervises a few slots alone, so that its report
and its gradients are those of these slots, and can be judged by `judge.sampled_reference`; its learning rate
is 0. The second supervises what the run asks for; of it are recorded bytes, calls, seconds, and the loss of
every guess.

Legend: L tokens, K TTT steps, n tapped slots of a rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.algorithms.eagle3 import DraftModel, Eagle3Shape
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.config import fill_deepspeed_config
from eagle3_ds.draft import LossInputs
from eagle3_ds.draft.tile_loss import TileLoss, TileTerms
from eagle3_ds.draft.tiled_loss import LossTile
from eagle3_ds.layout import LocalBatch, PackedSequence, live_slots
from eagle3_ds.topology import Topology
from eagle3_ds.train.spans import plan_spans
from eagle3_ds.train.trainer import DraftTrainer, StepReport
from judge.collective_calls import CollectiveCalls
from judge.dense_reference import LossRules, MicroBatch
from judge.product import record_gradients, vocabulary_map
from judge.sample_run import SampleRun
from judge.step_inputs import StepModel, StepShape, answers_mask, make_model
from judge.tensor_bytes import TensorBytes

FloatArray = NDArray[np.float32]
SHARPNESS = 1.6
"""Queries and keys are so much larger than unit: scores have a deviation of 2.5, so that the softmax over
100,000 keys is over some hundred, and a key that is missing is seen.
"""
_FAVOURITE_LOGIT = 8.0
_BLOCK = 8192


@dataclass(frozen=True)
class LongRun(SampleRun):
    """A `SampleRun` with weights and hidden states whose numbers mean something.

    Attributes:
        supervised: share of the tokens in the loss, as answers in turns over the whole length.
    """

    supervised: float = 1.0

    @property
    def rules(self) -> LossRules:
        return LossRules(self.ttt_steps, self.recipe().loss.decay)

    def loss_mask(self) -> Tensor:
        return answers_mask(self.length, self.supervised)

    def model(self) -> StepModel:
        """Made anew, so that no rank keeps a second copy. Norms are not all ones, and the attention has its
        SHARPNESS.
        """
        assert isinstance(self.shape, Eagle3Shape)
        model = make_model(StepShape(self.shape, self.ttt_steps))
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.weights.items():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(SHARPNESS)
        return model

    def trainer(self, topology: Topology) -> TappedTrainer:
        recipe, model = self.recipe(), self.model()
        settings = fill_deepspeed_config(self.deepspeed or {}, recipe, self.world_size, self.draft_dp)
        draft = DraftModel(self.config())
        draft.load_state_dict(model.weights)
        frozen = model.frozen
        return TappedTrainer(
            recipe, settings, topology, draft, frozen.embedding, frozen.head, vocabulary_map(frozen)
        )

    def packs(self, dp_rank: int = 0) -> list[PackedSequence]:
        """Random tokens and hidden states that never repeat; a teacher with a favourite at each position, not
        always one of the draft vocabulary.
        """
        generator = torch.Generator().manual_seed(dp_rank)
        length, shape, head = self.length, self.shape, self.model().frozen.head
        token_ids, favourite = (
            torch.randint(0, shape.vocab_size, (length,), generator=generator) for _ in range(2)
        )
        aux = torch.randn(length, 3 * shape.hidden_size, generator=generator)
        teacher = torch.randn(length, shape.hidden_size, generator=generator)
        for rows in torch.arange(length).split(_BLOCK):
            towards = head[favourite[rows]]
            teacher[rows] += _FAVOURITE_LOGIT * towards / towards.square().sum(-1, keepdim=True)
        best = torch.cat([(rows.double() @ head.double().T).argmax(-1) for rows in teacher.split(_BLOCK)])
        lengths = self.lengths or (length,)
        return [PackedSequence(token_ids, self.loss_mask(), lengths, best, aux, teacher)]

    def batch(self, loss_mask: Tensor) -> MicroBatch:
        """The sequence as the reference takes it."""
        (pack,) = self.packs()
        assert isinstance(pack.aux, Tensor) and isinstance(pack.teacher, Tensor)
        return MicroBatch(pack.token_ids, loss_mask, pack.lengths, pack.aux, pack.teacher)

    def owners(self) -> NDArray[np.int64]:
        """int64 [L]: the sp rank that unrolls each slot, -1 where the slot is not live."""
        plan = plan_spans(self.recipe(), self.lengths or (self.length,), self.loss_mask())
        owner = np.full(plan.padded_length, -1, dtype=np.int64)
        for rank, slots in enumerate(plan.live.reshape(-1, plan.live_per_rank)):
            owner[slots] = rank
        return owner[: self.length]


@dataclass(frozen=True)
class Guesses:
    """The guesses of one rank in one step: slots int64 [n]; value and accepted fp32 [K, n], the loss and the
    chance that a server which samples accepts it; contributing bool [K, n].
    """

    slots: NDArray[np.int64]
    value: FloatArray
    accepted: FloatArray
    contributing: NDArray[np.bool_]


class LossTap:
    """Keeps what a trainer's loss gives for each guess, of one step, by wrapping the loss that the trainer
    hands to its tiles: the step itself, its cut and its tiles are as they are.
    """

    def __init__(self) -> None:
        self._tiles: list[LossTile] = []
        self._terms: list[tuple[FloatArray, FloatArray]] = []

    def tapped(self, inputs: LossInputs, batch: LocalBatch, contributing: Tensor) -> LossInputs:
        """The same inputs, with the loss wrapped."""
        self._tiles, self._contributing = list(inputs.tiles), contributing.numpy()
        self._slots = batch.plan.slots(batch.ring_rank, batch.ulysses_rank)
        return replace(inputs, loss=_TappedLoss(inputs.loss, self._terms))

    def guesses(self) -> Guesses:
        """Of the step that was taken."""
        steps = len(self._contributing)
        assert len(self._terms) == steps * len(self._tiles), "one call of the loss per tile and step"
        if not self._tiles:
            nothing = np.empty((steps, 0), dtype=np.float32)
            return Guesses(np.empty(0, dtype=np.int64), nothing, nothing, nothing.astype(np.bool_))
        columns = np.concatenate([tile.columns for tile in self._tiles])
        value, accepted = (
            np.stack(
                [np.concatenate([terms[which] for terms in self._terms[k::steps]]) for k in range(steps)]
            )
            for which in (0, 1)
        )
        return Guesses(self._slots[columns], value, accepted, self._contributing[:, columns])


class TappedTrainer(DraftTrainer):
    """A trainer whose loss goes through `tap`, while there is one."""

    tap: LossTap | None = None

    def _loss_inputs(self, batch: LocalBatch, contributing: Tensor, step_weight: Tensor) -> LossInputs:
        inputs = super()._loss_inputs(batch, contributing, step_weight)
        return inputs if self.tap is None else self.tap.tapped(inputs, batch, contributing)


class _TappedLoss:
    """A `TileLoss` that also keeps its terms, outside of torch, so that nobody counts their bytes."""

    def __init__(self, loss: TileLoss, terms: list[tuple[FloatArray, FloatArray]]) -> None:
        self._loss, self._terms = loss, terms

    @property
    def temporaries(self) -> int:
        return self._loss.temporaries

    def __call__(self, logits: Tensor, target: Tensor) -> TileTerms:
        terms = self._loss(logits, target)
        self._terms.append((terms.value.numpy().copy(), terms.acceptance.numpy().copy()))
        return terms

    def fused(self, logits: Tensor) -> None:
        """None: its terms would pass by this object."""

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._loss.plain(logits, target)


@dataclass(frozen=True)
class RankRecord:
    """What one rank saw of the two steps.

    Attributes:
        sampled: report of the step that supervises the sampled slots alone.
        gradients: its whole gradients by parameter, flattened; empty except on rank 0.
        report, guesses: of the second step.
        seconds: of the second step, with the counters in place.
        rest, peak: bytes between the steps, and at the second one's peak; without the packs.
        calls: (calls, payload) of the second step by (axis, kind).
    """

    sampled: StepReport
    gradients: dict[str, NDArray[np.float64]]
    report: StepReport
    guesses: Guesses
    seconds: float
    rest: int
    peak: int
    calls: dict[tuple[str, str], tuple[int, int]]


def take_steps(run: LongRun, sampled_mask: NDArray[np.bool_]) -> RankRecord:
    """On every rank: the two steps. Collective over the run's world."""
    topology = run.topology()
    (pack,) = run.packs()
    few = replace(pack, loss_mask=torch.from_numpy(sampled_mask))
    with TensorBytes(all_added=True) as counted:
        tensors = [*vars(pack).values(), few.loss_mask]
        counted.add(tensor for tensor in tensors if isinstance(tensor, Tensor))
        of_packs = counted.live
        trainer = run.trainer(topology)
        sampled, gradients = _step_with_gradients(trainer, few)
        gc.collect()
        counted.mark()
        groups = {"ulysses": topology.ulysses_group, "ring": topology.ring_group}
        trainer.tap = tap = LossTap()
        with CollectiveCalls(groups) as calls:
            started = time.perf_counter()
            report = trainer.step([pack], run.recipe().train.learning_rate)
            seconds = time.perf_counter() - started
    return RankRecord(
        sampled,
        gradients if topology.place.rank == 0 else {},
        report,
        tap.guesses(),
        seconds,
        counted.baseline - of_packs,
        counted.peak - of_packs,
        {key: (count.calls, count.payload) for key, count in calls.counts.items()},
    )


def _step_with_gradients(
    trainer: DraftTrainer, pack: PackedSequence
) -> tuple[StepReport, dict[str, NDArray[np.float64]]]:
    """One step that changes no weight, and its whole gradients; nothing of them stays in torch's memory."""
    step = trainer.engine.step
    found: list[dict[str, Tensor]] = []
    record_gradients(trainer, found)
    report = trainer.step([pack], learning_rate=0.0)
    trainer.engine.step = step
    (gradients,) = found
    return report, {name: gradient.numpy().copy() for name, gradient in gradients.items()}


def sample_mask(runs: Sequence[LongRun], clusters: int) -> NDArray[np.bool_]:
    """bool [L]: a loss mask of K tokens here and there, about `clusters` times: evenly over the length, at
    the starts and ends of documents, and where one rank's slots end and another's begin, in any of `runs`.
    """
    length, steps = runs[0].length, runs[0].ttt_steps
    places = set(np.linspace(0, length - 1, clusters).astype(int).tolist())
    for run in runs:
        ends = np.cumsum(run.lengths or (length,))
        places |= {int(slot) for end in ends for slot in (end - steps, end - steps - 1, end, end + 1)}
        owner = run.owners()
        live = np.flatnonzero(owner >= 0)
        last = live[:-1][owner[live[1:]] != owner[live[:-1]]]
        places |= {int(slot) for slot in last}
        # Some that are in the loss of every run, in the middle of its answers.
        answers = np.flatnonzero(run.loss_mask().numpy())
        places |= {int(slot) for slot in answers[np.linspace(0, len(answers) - 1, clusters).astype(int)]}
    mask = np.zeros(length, dtype=np.bool_)
    for place in places:
        mask[max(0, place) : place + steps] = True
    return mask


def sampled_slots(run: LongRun, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The slots that enter the loss under a mask, at one TTT step or more, ascending."""
    rule = TTTSupervision(run.ttt_steps, run.recipe().loss.mask_alignment)
    return np.flatnonzero(live_slots(run.lengths or (run.length,), torch.from_numpy(mask), rule))
