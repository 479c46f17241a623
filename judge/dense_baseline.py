"""The dense baseline: an efficient but plain EAGLE-3 training step, with whose speed and memory benchmarks
compare the product.

It runs in one process with plain autograd. Each TTT step has the whole attention matrix, diagonals included,
in one softmax, and all draft logits. The teacher's logits over the full vocabulary are computed once. It uses
torch's fused operators, shifts constants by slicing instead of copying, and computes only the loss.

Legend: L slots, K TTT steps, H hidden size, N query heads, D head size, V target vocabulary, Vd draft
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from eagle3_ds.layout import PackedSequence
from judge.cases import NORMS
from judge.dense_reference import Frozen, LossRules, MicroBatch, rotary_frequencies
from judge.result_file import now
from judge.step_inputs import TimedStep, as_batch

# Attention of one TTT step: (q [N, L, D], keys and values of all steps so far, [N, L, D] each, mask) ->
# [N, L, D].
Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], "Mask"], Tensor]


class DenseDraft:
    """A draft and its training step.

    Attributes:
        parameters: the weights by the names of DraftModel, in the dtype and on the device of the step.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: LlamaConfig,
        frozen: Frozen,
        rules: LossRules,
        attention: str = "eager",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """`attention` is one of ATTENTION_FORMS.

        Raises:
            ValueError: no such form, more than one layer, a sliding window, norms of variants, or loss rules
                other than the recipe's defaults.
        """
        if attention not in ATTENTION_FORMS:
            raise ValueError(
                f"attention = {attention!r} is unknown. Use one of {', '.join(ATTENTION_FORMS)}."
            )
        defaults = ("served", "supervised", "kl")
        if config.num_hidden_layers != 1 or (rules.alignment, rules.reduction, rules.kind) != defaults:
            raise ValueError(
                f"{config.num_hidden_layers} layers with {rules}: the baseline has one layer, served, "
                "supervised, and learns by kl."
            )
        norms = [name for name in NORMS["all"] if getattr(config, name, False)]
        if norms:
            raise ValueError(f"{', '.join(norms)}: the baseline is the paper's draft, without these norms.")
        if getattr(config, "sliding_window", None) is not None:
            raise ValueError(f"sliding_window = {config.sliding_window}: the baseline has full attention.")
        self.config, self.rules = config, rules
        self.parameters = {
            name: weight.detach().to(device, dtype, copy=True).requires_grad_()
            for name, weight in weights.items()
        }
        self._embedding, self._head = (x.to(device, dtype) for x in (frozen.embedding, frozen.head))
        self._draft_to_target = (frozen.d2t + torch.arange(len(frozen.d2t))).to(device)
        self._frequency = rotary_frequencies(config).to(device)
        self._attend = ATTENTION_FORMS[attention]

    def step(self, batch: MicroBatch) -> tuple[float, float]:
        """Forward and backward of one whole packed sequence; the gradients replace those of the last step.

        Returns:
            The loss, and the norm of the gradient.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        return loss.item(), norm.item()

    def run(self, pack: PackedSequence) -> TimedStep:
        """Time a `step`, without an optimizer."""
        device = self._head.device
        started = now(device)
        loss, norm = self.step(as_batch(pack))
        return TimedStep(loss, norm, now(device) - started)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step by parameter, flattened, in fp64 on the host."""
        return {
            name: p.grad.detach().double().cpu().reshape(-1)
            for name, p in self.parameters.items()
            if p.grad is not None
        }

    def _loss(self, batch: MicroBatch) -> Tensor:
        constants = self._constants(batch)
        length, device = len(batch.token_ids), self._head.device
        hidden = functional.linear(batch.aux.to(device, self._head.dtype), self.parameters["fc.weight"])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        total = hidden.new_zeros((), dtype=constants.weight.dtype)
        for k in range(self.rules.ttt_steps):
            ahead = slice(1 + k, 1 + k + length)
            embeds = functional.embedding(constants.token_ids[ahead], self._embedding)
            hidden = self._layer(
                embeds, hidden, constants.angle + k * self._frequency, keys, values, constants.mask
            )
            logits = functional.linear(self._norm(hidden, "norm"), self.parameters["lm_head.weight"])
            entropy = functional.cross_entropy(
                logits.to(total.dtype), constants.teacher[ahead], reduction="none"
            )
            total = total + torch.dot(entropy, constants.weight[k])
        return total

    @torch.no_grad()
    def _constants(self, batch: MicroBatch) -> _Constants:
        steps, length, device = self.rules.ttt_steps, len(batch.token_ids), self._head.device
        document = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths)).to(
            device
        )
        start = torch.tensor(batch.lengths).cumsum(0) - torch.tensor(batch.lengths)
        position = torch.arange(length, device=device) - start.to(device)[document]
        logits = functional.linear(batch.teacher.to(device, self._head.dtype), self._head)
        covered = torch.isin(logits.argmax(-1), self._draft_to_target)
        # With K more rows than slots, each TTT step reads a slice. A slot that reads outside its document has
        # the weight 0.
        wide = torch.promote_types(self._head.dtype, torch.float32)
        teacher = logits.new_zeros(length + steps + 1, len(self._draft_to_target), dtype=wide)
        torch.softmax(logits[:, self._draft_to_target], -1, dtype=wide, out=teacher[:length])
        beyond = torch.cat((document, document.new_full((steps + 1,), -1)))
        counted = torch.cat((covered & batch.loss_mask.to(device), covered.new_zeros(steps + 1)))
        reads = [slice(1 + k, 1 + k + length) for k in range(steps)]
        in_loss = torch.stack([counted[read] & (beyond[read] == document) for read in reads])
        decay = self.rules.decay ** torch.arange(steps, device=device, dtype=wide)
        return _Constants(
            token_ids=functional.pad(batch.token_ids.to(device), (0, steps + 1)),
            angle=position[:, None] * self._frequency,
            teacher=teacher,
            weight=in_loss * (decay / in_loss.sum(1).clamp(min=1))[:, None],
            mask=Mask.make(document, steps, self._head.dtype),
        )

    def _layer(
        self,
        embeds: Tensor,
        hidden: Tensor,
        angle: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        mask: Mask,
    ) -> Tensor:
        """The decoder layer at one TTT step: [L, H] -> [L, H]. Appends the step's keys and values."""
        x = torch.cat(
            (self._norm(embeds, "layers.0.input_layernorm"), self._norm(hidden, "layers.0.hidden_norm")),
            dim=-1,
        )
        q, k, v = (
            self._project(x, f"self_attn.{name}_proj").unflatten(-1, (-1, self.config.head_dim))
            for name in "qkv"
        )
        angle = torch.cat((angle, angle), -1)[:, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        # Repeated keys for grouped query heads take little memory compared with L x L scores.
        group = q.shape[1] // k.shape[1]
        keys.append(_heads_first(_rotate(k, cos, sin), group))
        values.append(_heads_first(v, group))
        attended = (
            self._attend(_heads_first(_rotate(q, cos, sin), 1), keys, values, mask).transpose(0, 1).flatten(1)
        )
        hidden = hidden + self._project(attended, "self_attn.o_proj")
        normed = self._norm(hidden, "layers.0.post_attention_layernorm")
        gate, up = (self._project(normed, f"mlp.{name}_proj") for name in ("gate", "up"))
        return hidden + self._project(functional.silu(gate) * up, "mlp.down_proj")

    def _project(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.parameters[f"layers.0.{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


@dataclass(frozen=True)
class Mask:
    """Additive attention masks.

    Attributes:
        causal: [L, L]: 0 where the slot of the row may attend to that of the column (not later, and in the
            same document), else -inf.
        wide: [L, K * L]: `causal`, followed by K - 1 diagonal blocks; made only when it is used.
    """

    causal: Tensor
    steps: int

    @staticmethod
    def make(document: Tensor, steps: int, dtype: torch.dtype) -> Mask:
        index = torch.arange(len(document), device=document.device)
        may_attend = (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
        return Mask(_additive(may_attend, dtype), steps)

    @cached_property
    def wide(self) -> Tensor:
        diagonal = _additive(
            torch.eye(len(self.causal), dtype=torch.bool, device=self.causal.device), self.causal.dtype
        )
        return torch.cat((self.causal, *[diagonal] * (self.steps - 1)), dim=-1)


@dataclass(frozen=True)
class _Constants:
    """What the K TTT steps read; step k reads a slice that is shifted by k.

    Attributes:
        token_ids: int64 [L + K + 1].
        angle: [L, D / 2], rotary angles of step 0.
        teacher: probabilities [L + K + 1, Vd], in fp32, or in fp64 if the step is.
        weight: [K, L]: decay**k / N_k for slots in the loss, else 0.
    """

    token_ids: Tensor
    angle: Tensor
    teacher: Tensor
    weight: Tensor
    mask: Mask


def eager_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Mask) -> Tensor:
    """Attention as two matrix products, with one softmax over the scores of step 0 and the diagonals of later
    steps: q [N, L, D], keys and values [N, L, D] for each step -> [N, L, D].
    """
    (k0, *later_keys), (v0, *later_values) = keys, values
    num_heads, length, head_dim = q.shape
    scale = head_dim**-0.5
    scores = torch.baddbmm(mask.causal.expand(num_heads, -1, -1), q, k0.mT, alpha=scale)
    if not later_keys:
        return torch.bmm(scores.softmax(-1), v0)
    own_scores = torch.stack([(q * key).sum(-1) for key in later_keys], dim=-1) * scale
    step_zero, own_slot = (
        torch.cat((scores, own_scores), -1).softmax(-1).split((length, len(later_keys)), dim=-1)
    )
    out = torch.bmm(step_zero, v0)
    for probability, value in zip(own_slot.split(1, dim=-1), later_values, strict=True):
        out = torch.addcmul(out, probability, value)
    return out


def fused_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Mask) -> Tensor:
    """torch's fused attention over the concatenated keys of all steps, those of later steps masked to a
    diagonal: q [N, L, D], keys and values [N, L, D] for each step -> [N, L, D].
    """
    k, v = (torch.cat(tuple(parts), dim=1) for parts in (keys, values))
    return functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask.wide[:, : k.shape[1]]
    )[0]


ATTENTION_FORMS: Mapping[str, Attention] = {"eager": eager_attention, "fused": fused_attention}


def _additive(may_attend: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device).masked_fill_(
        ~may_attend, -math.inf
    )


def _heads_first(x_LHD: Tensor, repeats: int) -> Tensor:
    """[L, H, D] -> [H * repeats, L, D], contiguous."""
    return x_LHD.repeat_interleave(repeats, dim=1).transpose(0, 1).contiguous()


def _rotate(x_LHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotary embedding [L, H, D] -> [L, H, D], computed in the dtype of cos. Channel c is rotated
    with channel c + D / 2.
    """
    first, second = x_LHD.chunk(2, dim=-1)
    return (x_LHD * cos + torch.cat((-second, first), dim=-1) * sin).to(x_LHD.dtype)
