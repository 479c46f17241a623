"""DraftTrainer: takes optimizer steps on packed sequences.

A *pack* is one packed sequence: documents laid end to end, at most data.max_length tokens. A *live slot* is a
slot with at least one supervised TTT step; the loss is computed at live slots only.

Legend: K TTT steps, Q live slots of this rank, V target vocabulary, Vd draft vocabulary, H hidden size of the
draft, Ht hidden size of the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.attention import patch_attention
from eagle3_ds.attention.costs import choose_kv_exchange
from eagle3_ds.collectives.agreement import sum_reals_over_ranks
from eagle3_ds.config import Recipe
from eagle3_ds.costs import Setup
from eagle3_ds.draft import Draft, LossInputs, LossSum, VocabularyMap, loss_tiles, sliding_window
from eagle3_ds.kernels import checked_kernel
from eagle3_ds.layout import LocalBatch, PackedSequence, prepare_usp_input, stream_rows
from eagle3_ds.losses import loss_of
from eagle3_ds.parts import BACKWARD, EXCHANGE, FORWARD, INPUTS, REPORT, marked
from eagle3_ds.topology import Topology
from eagle3_ds.train.engine import DraftWithLoss, build_engine, full_parameters, step_and_norm
from eagle3_ds.train.quiet import ignore_renamed_collectives
from eagle3_ds.train.spans import plan_spans


@dataclass(frozen=True)
class StepReport:
    """Means over all ranks; every rank has the same numbers.

    Attributes:
        loss: sum over k of decay**k * step_loss[k].
        step_loss, step_accuracy: one number per TTT step.
        tau: acceptance length of greedy decoding: 1 + sum over k of the share of slots at which the guesses
            of TTT steps 0..k are all right.
        acceptance_length: acceptance length of a server that samples: 1 + sum over k of the probability that
            it accepts the guesses 0..k, computed from both distributions over the draft vocabulary.
        grad_norm: norm of the whole gradient before clipping; None for an evaluation.
        tokens: tokens of all draft_dp ranks, padding not counted.
    """

    loss: float
    step_loss: tuple[float, ...]
    step_accuracy: tuple[float, ...]
    tau: float
    acceptance_length: float
    tokens: int
    grad_norm: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class DraftTrainer:
    """Trains one draft. The constructor and every method are collective over the world unless they say
    otherwise: all ranks call them in the same order, the ranks of one sp group with the same packs.

    Args:
        recipe: the run.
        deepspeed_config: complete DeepSpeed settings (`fill_deepspeed_config`).
        topology: this rank's place in the mesh, and its process groups.
        draft: whole fp32 weights, the same on all ranks; DeepSpeed makes its fp32 master copies from them.
        embedding: the target's [V, H], whole on every rank.
        head: the target's [V, Ht], whole on every rank.
        vocabulary: the draft vocabulary.

    Raises:
        ValueError: the attention kernel cannot run on this device, or not with this dtype and head size.
    """

    def __init__(
        self,
        recipe: Recipe,
        deepspeed_config: dict[str, Any],
        topology: Topology,
        draft: Draft,
        embedding: Tensor,
        head: Tensor,
        vocabulary: VocabularyMap,
    ) -> None:
        ignore_renamed_collectives()
        self.recipe, self.topology, self.draft, self.vocabulary = recipe, topology, draft, vocabulary
        self.algorithm = algorithm_of(recipe)
        self.supervision = self.algorithm.supervision(recipe)
        self.dtype = getattr(torch, recipe.train.dtype)
        device = topology.device
        kernel = checked_kernel(recipe.attention.kernel, device, self.dtype, draft.config.head_dim)
        self.kernel_name = kernel.name
        shape = self.algorithm.shape(draft.config)
        self.setup = Setup.of(recipe, deepspeed_config, shape, topology.draft_dp)
        asked = recipe.parallel.kv_exchange
        self.kv_exchange = choose_kv_exchange(self.setup) if asked == "auto" else asked
        groups = (topology.ulysses_group, topology.ring_group)
        patch_attention(
            draft,
            kernel,
            *groups,
            self.kv_exchange,
            recipe.parallel.kv_bytes,
            window=sliding_window(draft.config),
        )
        self.draft_to_target = vocabulary.draft_to_target.to(device)
        self._in_vocabulary = vocabulary.t2d.cpu()
        self._teacher_head = self._draft_rows(head)
        model = DraftWithLoss(draft, embedding.to(device, self.dtype), self.algorithm.settings(recipe))
        self.engine, self.loss_scale, self.scale_check = build_engine(
            recipe, deepspeed_config, topology, model
        )
        self._loss = loss_of(recipe.loss)
        self._decay = recipe.loss.decay ** torch.arange(self.supervision.num_guesses, dtype=torch.float64)

    def step(self, packs: Sequence[PackedSequence], learning_rate: float | None = None) -> StepReport:
        """Take one optimizer step. Collective.

        Args:
            packs: `train.accumulation` packs, those of this draft_dp rank.
            learning_rate: of this step; None keeps the last one.

        Raises:
            ValueError: the number of packs is not `train.accumulation`.
            RuntimeError: the installed DeepSpeed averages gradients otherwise than this trainer counts on
                (`scale`); asked in the first step alone.
        """
        if len(packs) != self.recipe.train.accumulation:
            raise ValueError(
                f"step() got {len(packs)} packs, but train.accumulation is {self.recipe.train.accumulation}: "
                "DeepSpeed counts micro-batches, so give exactly that many."
            )
        if learning_rate is not None:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = learning_rate
        self.engine.train()
        batches, inputs, normalizer = self._prepare(packs)
        sums = []
        for micro, (batch, constants) in enumerate(zip(batches, inputs, strict=True), start=1):
            loss = self._forward(batch, constants)
            # The gradients of a loss that is not finite may be finite. They are made NaN, which makes the
            # reduced norm NaN on every rank, so that all ranks skip the step.
            scale = torch.where(loss.total.isfinite(), self.loss_scale, math.nan)
            self._backward(loss.total * scale)
            # Keep the sums without their graph, which would hold the keys and values of every micro-batch
            # until the step is over.
            sums.append(LossSum(*(value.detach() for value in loss)))
            del loss
            if micro < len(batches):
                self.engine.step()
        self.scale_check.compare(self.engine, self.loss_scale)
        grad_norm = step_and_norm(self.engine)
        tokens = sum(sum(pack.lengths) for pack in packs)
        return replace(self._report(sums, normalizer, tokens), grad_norm=grad_norm)

    @marked(FORWARD)
    def _forward(self, batch: LocalBatch, constants: LossInputs) -> LossSum:
        found: LossSum = self.engine(batch, constants)
        return found

    @marked(BACKWARD)
    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def evaluate(self, packs: Sequence[PackedSequence]) -> StepReport:
        """Loss and accuracy over the packs of all draft_dp ranks. Collective: each rank passes its own packs,
        equally many on every rank.

        Packs are read one at a time, so that with an online target only one pack's hidden states exist.
        """
        self.engine.eval()
        sums, tokens = [], 0
        normalizer = torch.zeros(self.supervision.num_guesses, dtype=torch.float64)
        for pack in packs:
            (batch,), (inputs,), counted = self._prepare([pack])
            sums.append(self.engine(batch, inputs))
            normalizer += counted
            tokens += sum(pack.lengths)
        return self._report(sums, normalizer, tokens)

    def update_target(self, embedding: Tensor, head: Tensor) -> None:
        """Replace the target's embedding [V, H] and head [V, Ht], whole on every rank, for example after an
        RL policy was updated. Not collective.
        """
        self.engine.module.use_embedding(embedding.detach().to(self.topology.device, self.dtype, copy=True))
        self._teacher_head = self._draft_rows(head.detach())

    def _draft_rows(self, head: Tensor) -> Tensor:
        """The rows [Vd, Ht] of the draft vocabulary in the target's head [V, Ht], on this rank's device."""
        return head[self.draft_to_target.to(head.device)].to(self.topology.device, self.dtype)

    @torch.no_grad()
    def own_losses(self, pack: PackedSequence) -> tuple[Tensor, bool]:
        """The loss of one pack on this rank, to find the documents that made a step not finite. Collective.

        Returns:
            The loss of each TTT step summed over this rank's live slots, fp32 [K] on the host; and whether
            all hidden states that this rank read are finite.
        """
        self.engine.eval()
        (batch,), (inputs,), _ = self._prepare([pack])
        loss: LossSum = self.engine(batch, inputs)
        read = [batch.aux[:], *(batch.teacher.take(tile.rows) for tile in inputs.tiles)]
        return loss.step_loss.cpu(), all(bool(rows.isfinite().all()) for rows in read)

    def frozen_tensors(self) -> list[Tensor]:
        """The frozen tensors, equal on every rank: the target's embedding [V, H], and its head's rows of the
        draft vocabulary [Vd, Ht]. Not collective.
        """
        return [*self.engine.module.frozen, self._teacher_head]

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """The draft's whole weights, on the CPU of every rank that keeps them, by their names in the draft;
        nothing on the others. Collective.
        """
        return {
            name.removeprefix("draft."): tensor
            for name, tensor in full_parameters(self.engine.module, keep).items()
        }

    @marked(INPUTS)
    def _prepare(self, packs: Sequence[PackedSequence]) -> tuple[list[LocalBatch], list[LossInputs], Tensor]:
        recipe, place = self.recipe, self.topology.place
        ranks = (place.ring_rank, place.ulysses_rank)
        plans = [plan_spans(recipe, pack.lengths, pack.loss_mask, pack.anchors) for pack in packs]
        batches = [
            prepare_usp_input(pack, plan, *ranks, self.supervision)
            for pack, plan in zip(packs, plans, strict=True)
        ]
        contributing = [self._contributing(batch) for batch in batches]
        normalizer = self._normalizer(batches, contributing)
        weight = torch.where(normalizer > 0, self._decay / normalizer.clamp(min=1), 0.0)
        inputs = [
            self._loss_inputs(batch, counted, weight)
            for batch, counted in zip(batches, contributing, strict=True)
        ]
        return batches, inputs, normalizer

    def _contributing(self, batch: LocalBatch) -> Tensor:
        """Which guesses enter the loss, bool [K, Q] on the host for this rank's live slots: those that are
        supervised and whose teacher token is in the draft vocabulary.
        """
        read = batch.live_row[None, :] + 1 + torch.arange(len(batch.supervised))[:, None]
        return batch.supervised & self._in_vocabulary[batch.teacher_token][read]

    def _normalizer(self, batches: Sequence[LocalBatch], contributing: Sequence[Tensor]) -> Tensor:
        """What the loss of each TTT step is divided by, float64 [K] on the host: the contributing guesses, or
        all slots, of the whole optimizer step on all ranks. Collective over the world.
        """
        if self.recipe.loss.reduction == "slots":
            counts = torch.full((self.supervision.num_guesses,), sum(batch.num_slots for batch in batches))
        else:
            counts = torch.stack([counted.sum(1) for counted in contributing]).sum(0)
        counts = counts.to(self.topology.device)
        self._sum_over_world(counts)
        return counts.cpu().double()

    def _loss_inputs(self, batch: LocalBatch, contributing: Tensor, step_weight: Tensor) -> LossInputs:
        device = self.topology.device
        tiles = loss_tiles(
            batch.live_row.numpy(),
            batch.supervised.numpy(),
            self.recipe.loss.tile_bytes,
            len(self.draft_to_target),
            self.dtype.itemsize,
        )
        return LossInputs(
            tiles=tiles,
            teacher=stream_rows(batch.teacher, [tile.rows for tile in tiles], device, self.dtype),
            teacher_head=self._teacher_head,
            teacher_token=batch.teacher_token.to(device),
            draft_to_target=self.draft_to_target,
            contributing=contributing.to(device),
            supervised=batch.supervised.to(device),
            step_weight=step_weight.float().to(device),
            eps=self.draft.config.rms_norm_eps,
            loss=self._loss,
        )

    @marked(REPORT)
    def _report(self, sums: Sequence[LossSum], normalizer: Tensor, own_tokens: int) -> StepReport:
        names = ("step_loss", "hits", "counts", "joint_hits", "joint_counts", "joint_acceptance")
        of_packs = torch.stack([torch.cat([getattr(s, name) for name in names]) for s in sums]).cpu()
        count = torch.tensor([float(own_tokens)], dtype=torch.float64)
        own = torch.cat([of_packs.double().sum(0), count])
        flat = self._sum_reals(own)
        *columns, tokens = flat.split([len(normalizer)] * len(names) + [1])
        loss, hits, counts, joint_hits, joint_counts, joint_acceptance = columns
        step_loss = loss / normalizer.clamp(min=1)
        return StepReport(
            loss=float((step_loss * self._decay).sum()),
            step_loss=tuple(step_loss.tolist()),
            step_accuracy=tuple((hits / counts.clamp(min=1)).tolist()),
            tau=1.0 + float((joint_hits / joint_counts.clamp(min=1)).sum()),
            acceptance_length=1.0 + float((joint_acceptance / joint_counts.clamp(min=1)).sum()),
            tokens=int(tokens) // self.topology.sp_world_size,
        )

    @marked(EXCHANGE)
    def _sum_reals(self, own: Tensor) -> Tensor:
        return sum_reals_over_ranks(own, self.topology.device)

    @marked(EXCHANGE)
    def _sum_over_world(self, tensor: Tensor) -> None:
        if dist.is_initialized():
            dist.all_reduce(tensor)


def learning_rate_at(recipe: Recipe, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear warm-up, then `train.schedule` down to
    `min_lr_ratio` of the peak.
    """
    train = recipe.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.learning_rate * (train.min_lr_ratio + (1 - train.min_lr_ratio) * shape)
