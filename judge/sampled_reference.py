"""The dense reference at some slots of a sequence that is too long for it: the same formulas
(judge/dense_reference.py), no matrix of L x L.

In a draft of one layer, what a slot computes at TTT step k depends on its own steps before and on the step-0
keys and values of earlier slots, and on nothing else. So step-0 keys and values are computed for all slots, a
block at a time, and the K steps for the chosen slots alone, a few queries at a time. Backward repeats each
block, so that the gradient, too, is plain autograd's and needs no more memory.

Legend: as in judge/dense_reference.py; n chosen slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from judge.dense_reference import (
    Frozen,
    LossRules,
    MicroBatch,
    Weights,
    after_attention,
    before_attention,
    normed_aux,
    of_guesses,
    rms_norm,
    rotary_frequencies,
)

SLOT_BLOCK = 8192
SCORES_BLOCK = 2**19
"""Scores of one head that are computed at once, so many queries times all L keys."""


@dataclass(frozen=True)
class SampledSlots:
    """What the K steps give at the chosen slots, whatever the loss mask says; [K, n] each.

    Attributes:
        slots: int64 [n], ascending.
        value: the loss of the guess, with autograd's graph.
        accepted: the chance that a server which samples accepts the guess.
        right: whether the guess is the teacher's argmax over the full vocabulary.
        covered: whether that argmax is in the draft vocabulary.
        inside: whether the slot that the step reads is in the same document; nothing else counts.
        read: int64, that slot.
    """

    slots: Tensor
    value: Tensor
    accepted: Tensor
    right: Tensor
    covered: Tensor
    inside: Tensor
    read: Tensor

    def supervised(self, loss_mask: Tensor, alignment: str) -> Tensor:
        """bool [K, n] under a loss mask [L]."""
        at = self.read if alignment == "served" else self.read - 1
        return self.inside & loss_mask[at.clamp(min=0)]


@dataclass(frozen=True)
class SampledStep:
    """The figures of an optimizer step in whose loss there are the chosen slots alone; as `StepResult`."""

    loss: float
    step_loss: tuple[float, ...]
    step_accuracy: tuple[float, ...]
    tau: float
    acceptance_length: float
    gradients: dict[str, Tensor]
    grad_norm: float


class SampledReference:
    """One packed sequence, and the slots at which it is computed.

    Args:
        weights: whole, by the draft's parameter names; all computations are in their dtype.
        frequency: the angle per position of each pair of channels [R / 2]. Angles are multiplied in its
            dtype: fp32 ones are rounded as transformers' and servers' are, which matters at positions of
            100,000. None: fp64, as in the dense reference.

    Raises:
        ValueError: the draft has more than one layer, whose keys depend on every slot's attention.
    """

    def __init__(
        self,
        weights: Weights,
        config: LlamaConfig,
        frozen: Frozen,
        batch: MicroBatch,
        rules: LossRules,
        slots: Sequence[int] | Tensor,
        frequency: Tensor | None = None,
    ) -> None:
        if config.num_hidden_layers != 1:
            raise ValueError(
                f"num_hidden_layers = {config.num_hidden_layers}: sampled slots can be computed alone in a "
                "draft of one layer only."
            )
        self.leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        self.config, self.frozen, self.batch, self.rules = config, frozen, batch, rules
        self.slots = torch.as_tensor(slots, dtype=torch.int64).unique()
        self.frequency = rotary_frequencies(config) if frequency is None else frequency
        self.dtype = weights["fc.weight"].dtype
        lengths = torch.tensor(batch.lengths)
        self._first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        self._end = torch.repeat_interleave(lengths.cumsum(0), lengths)

    def compute(self) -> SampledSlots:
        """All K steps at the chosen slots."""
        blocks = torch.arange(len(self.batch.token_ids)).split(SLOT_BLOCK)
        parts = [_recomputed(self._keys_values, block) for block in blocks]
        keys, values = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        chosen = self.slots.split(max(1, SCORES_BLOCK // len(self.batch.token_ids)))
        found = [_recomputed(self._steps, block, keys, values) for block in chosen]
        columns = [torch.cat(column, dim=1) for column in zip(*found, strict=True)]
        return SampledSlots(self.slots, *columns)

    def step(self, found: SampledSlots, loss_mask: Tensor) -> SampledStep:
        """Loss and gradients under a mask [L] that supervises chosen slots alone.

        Raises:
            ValueError: it supervises another slot, or the reduction counts slots that were not computed.
        """
        steps = self.rules.ttt_steps
        self._require_all_chosen(loss_mask)
        supervised = found.supervised(loss_mask, self.rules.alignment)
        contributing = supervised & found.covered
        step_loss = torch.where(contributing, found.value, 0.0).sum(1) / contributing.sum(1).clamp(min=1)
        decay = self.rules.decay ** torch.arange(steps, dtype=self.dtype)
        loss = (decay * step_loss).sum()
        gradients = dict(zip(self.leaves, torch.autograd.grad(loss, list(self.leaves.values())), strict=True))
        right, joint = (found.right & supervised), supervised.cumprod(0).bool()
        accepted = torch.where(contributing, found.accepted, 0.0).cumprod(0)

        def share(hits: Tensor, counted: Tensor) -> Tensor:
            return torch.where(counted, hits.to(self.dtype), 0.0).sum(1) / counted.sum(1).clamp(min=1)

        return SampledStep(
            loss=loss.item(),
            step_loss=tuple(step_loss.tolist()),
            step_accuracy=tuple(share(right, supervised).tolist()),
            tau=1.0 + share(right.cumprod(0), joint).sum().item(),
            acceptance_length=1.0 + share(accepted, joint).sum().item(),
            gradients=gradients,
            grad_norm=math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values())),
        )

    def _require_all_chosen(self, loss_mask: Tensor) -> None:
        if self.rules.reduction != "supervised":
            raise ValueError(f"reduction = {self.rules.reduction!r}: sampled slots know 'supervised' alone.")
        index = torch.arange(len(loss_mask))
        live = torch.zeros(len(loss_mask), dtype=torch.bool)
        for k in range(self.rules.ttt_steps):
            read, inside = self.read_ahead(index, 1 + k)
            live |= inside & loss_mask[read if self.rules.alignment == "served" else (read - 1).clamp(min=0)]
        others = live.clone()
        others[self.slots] = False
        if others.any():
            raise ValueError(
                f"the loss mask supervises {int(others.sum())} slots that were not computed, for example "
                f"slot {int(others.nonzero()[0])}."
            )

    def read_ahead(self, slots: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """The slot `ahead` of each, or the slot itself where that is in another document; and whether not."""
        inside = slots + ahead < self._end[slots]
        return torch.where(inside, slots + ahead, slots), inside

    def _entry(self, slots: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The embeddings [n, H] that slots read at a step, and their angles [n, R / 2]."""
        read, inside = self.read_ahead(slots, 1 + step)
        embeds = self.frozen.embedding[self.batch.token_ids[read]].to(self.dtype) * inside[:, None]
        position = (slots - self._first[slots] + step).to(self.frequency.dtype)
        return embeds, (position[:, None] * self.frequency).to(self.dtype)

    def _hidden(self, slots: Tensor) -> Tensor:
        """The hidden states of step 0, [n, H]."""
        aux = self.batch.aux[slots].to(self.dtype)
        return normed_aux(self.leaves, self.config, aux) @ self.leaves["fc.weight"].T

    def _keys_values(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        embeds, angle = self._entry(slots, 0)
        _, k, v = before_attention(self.leaves, self.config, 0, embeds, self._hidden(slots), angle)
        return k, v

    def _steps(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """The columns of `SampledSlots` for a few slots; keys, values [Hkv, L, D] of step 0."""
        start, end = int(self._first[slots].min()), int(slots.max()) + 1
        step_zero = keys[:, start:end], values[:, start:end]
        index = torch.arange(start, end)
        target_of = torch.arange(len(self.frozen.d2t)) + self.frozen.d2t
        hidden, diagonals, rows = self._hidden(slots), [], []
        for k in range(self.rules.ttt_steps):
            embeds, angle = self._entry(slots, k)
            q, own_k, own_v = before_attention(self.leaves, self.config, 0, embeds, hidden, angle)
            if k:
                diagonals.append((own_k, own_v))
            seen = (index >= self._first[slots, None]) & (index <= slots[:, None])
            if getattr(self.config, "sliding_window", None):
                seen &= slots[:, None] + k - index < self.config.sliding_window
            attended = _attention_of_few(q, *step_zero, diagonals, seen).transpose(0, 1).flatten(1)
            hidden = after_attention(self.leaves, self.config, 0, hidden, attended)
            normed = rms_norm(hidden, self.leaves["norm.weight"], self.config)
            logits = normed @ self.leaves["lm_head.weight"].T
            if getattr(self.config, "norm_output", False):
                hidden = normed
            read, inside = self.read_ahead(slots, 1 + k)
            of_teacher = self.batch.teacher[read].to(self.dtype) @ self.frozen.head.to(self.dtype).T
            best = of_teacher.argmax(-1)
            value, accepted = of_guesses(logits, of_teacher[:, target_of].softmax(-1), self.rules)
            right = target_of[logits.argmax(-1)] == best
            rows.append((value, accepted.detach(), right, torch.isin(best, target_of), inside, read))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _attention_of_few(
    q: Tensor, keys: Tensor, values: Tensor, diagonals: Sequence[tuple[Tensor, Tensor]], seen: Tensor
) -> Tensor:
    """One softmax over step-0 keys [Hkv, L, D] where `seen` [n, L], and one key per later step in the same
    slot [Hkv, n, D] each: q [Hq, n, D] -> [Hq, n, D].
    """
    num_keys, scale = keys.shape[1], q.shape[-1] ** -0.5
    grouped = q.unflatten(0, (len(keys), -1))
    scores = (grouped @ keys[:, None].transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    own = [(grouped * k[:, None]).sum(-1, keepdim=True) * scale for k, _ in diagonals]
    probability = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = probability[..., :num_keys] @ values[:, None]
    for s, (_, v) in enumerate(diagonals):
        out = out + probability[..., num_keys + s, None] * v[:, None]
    return out.flatten(0, 1)


def _recomputed(function: Any, *tensors: Tensor) -> Any:
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
