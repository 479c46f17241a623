"""The dense reference: an EAGLE-3 training step in one process, with whose results the product must agree.

It was written from docs/semantics.md alone and shares no code with the product. It has full attention
matrices, full logits, plain autograd, and its own code for rotary embedding, vocabulary, masks and accuracy.
It is slow and needs much memory; use it in fp64.

Legend: L tokens of one micro-batch, K TTT steps, H hidden size of the draft, Ht the target's, D head
size, R channels of it that turn, Hq / Hkv heads, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """One whole packed sequence: token_ids int64 [L], loss_mask bool [L], document lengths with the sum L,
    aux [L, layers * H], teacher [L, H]; anchors bool [L], the only slots that guess, None for all.
    """

    token_ids: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...]
    aux: Tensor
    teacher: Tensor
    anchors: Tensor | None = None


@dataclass(frozen=True)
class LossRules:
    """The settings of the recipe's loss section, and `draft.ttt_steps`."""

    ttt_steps: int
    decay: float = 0.8
    alignment: str = "served"
    reduction: str = "supervised"
    kind: str = "kl"
    lk_eta: float = 3.0


@dataclass(frozen=True)
class Frozen:
    """The draft's frozen embedding [V, H], the target's head [V, Ht], and d2t int64 [Vd], where
    the target's id of draft token i is i + d2t[i].
    """

    embedding: Tensor
    head: Tensor
    d2t: Tensor


Guesses = Callable[[Weights, LlamaConfig, Frozen, MicroBatch, int], list[Tensor]]
"""An algorithm's arithmetic: from weights, config, frozen, a batch and the number of guesses, the draft
logits [L, Vd] of each guess.
"""


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW, and of clipping by the global norm as in DeepSpeed; `clip` 0 turns clipping off."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The figures of one optimizer step, and every parameter's gradient before clipping.

    `accuracy_slack` and `tau_slack` say how far rounding may move `step_accuracy` and `tau`: the share of
    slots whose two largest draft logits are nearly equal, one of them being right, so that rounding decides
    whether the argmax is.
    """

    loss: float
    step_loss: tuple[float, ...]
    step_accuracy: tuple[float, ...]
    accuracy_slack: tuple[float, ...]
    tau: float
    tau_slack: float
    acceptance_length: float
    gradients: dict[str, Tensor]
    grad_norm: float


@dataclass(frozen=True)
class _Sums:
    """Sums over the slots of one micro-batch, one entry per TTT step; only `entropy` carries a gradient."""

    slots: int
    entropy: Tensor
    in_loss: Tensor
    hits: Tensor
    counted: Tensor
    joint_hits: Tensor
    joint_counted: Tensor
    ties: Tensor
    joint_ties: Tensor
    joint_accepted: Tensor


def reference_step(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    batches: Sequence[MicroBatch],
    rules: LossRules,
    rounding: float = 0.0,
    guesses: Guesses | None = None,
) -> StepResult:
    """Loss, accuracies and gradients of one optimizer step.

    Args:
        weights: whole, by the draft's parameter names; all computations are in their dtype.
        batches: the whole micro-batches of all draft_dp ranks.
        rounding: logits that differ by less than this share of the largest count as ties.
        guesses: the arithmetic of another algorithm than EAGLE-3; loss and figures are the same.
    """
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    sums = [
        _micro_batch(leaves, config, frozen, batch, rules, rounding, guesses or unroll) for batch in batches
    ]
    entropy = torch.stack([s.entropy for s in sums]).sum(0)
    in_loss, hits, counted, joint_hits, joint_counted, ties, joint_ties, joint_accepted = (
        torch.stack([getattr(s, name) for s in sums]).sum(0).to(entropy.dtype)
        for name in (
            "in_loss",
            "hits",
            "counted",
            "joint_hits",
            "joint_counted",
            "ties",
            "joint_ties",
            "joint_accepted",
        )
    )
    if rules.reduction == "slots":
        in_loss = torch.full_like(in_loss, sum(s.slots for s in sums))
    step_loss = entropy / in_loss.clamp(min=1)
    decay = rules.decay ** torch.arange(rules.ttt_steps, dtype=entropy.dtype)
    loss = (decay * step_loss).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return StepResult(
        loss=loss.item(),
        step_loss=tuple(step_loss.tolist()),
        step_accuracy=tuple((hits / counted.clamp(min=1)).tolist()),
        accuracy_slack=tuple((ties / counted.clamp(min=1)).tolist()),
        tau=1.0 + (joint_hits / joint_counted.clamp(min=1)).sum().item(),
        tau_slack=(joint_ties / joint_counted.clamp(min=1)).sum().item(),
        acceptance_length=1.0 + (joint_accepted / joint_counted.clamp(min=1)).sum().item(),
        gradients=gradients,
        grad_norm=_global_norm(gradients),
    )


def reference_train(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    steps: Sequence[Sequence[MicroBatch]],
    rules: LossRules,
    optimization: Optimization,
    rounding: float = 0.0,
    held_in: torch.dtype | None = None,
    guesses: Guesses | None = None,
) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Take optimizer steps; `steps` has the micro-batches of each.

    `held_in` is the dtype that a step reads its weights in, where the optimizer's own are finer: each step's
    gradient is taken at the weights so rounded. None reads those of the optimizer. `guesses` as in
    `reference_step`.

    Returns:
        The result of each step, and the weights after the last one.
    """
    masters = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(
        masters.values(),
        lr=optimization.lr,
        betas=optimization.betas,
        eps=optimization.eps,
        weight_decay=optimization.weight_decay,
    )
    results = []
    for batches in steps:
        read = {n: m.to(held_in or m.dtype).to(m.dtype) for n, m in masters.items()}
        result = reference_step(read, config, frozen, batches, rules, rounding, guesses)
        clipped = 0 < optimization.clip < result.grad_norm
        factor = optimization.clip / (result.grad_norm + 1e-6) if clipped else 1.0
        for name, master in masters.items():
            master.grad = result.gradients[name] * factor
        optimizer.step()
        results.append(result)
    return results, {name: master.detach() for name, master in masters.items()}


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """The angle by which each pair of channels is rotated per position, fp64 [R / 2].

    Scalings that depend on a length take `config.rotary_length`, the longest that the draft is made for;
    where it is absent, `max_position_embeddings`.

    Raises:
        ValueError: a scaling that the semantics page does not know.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    turning = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    pair = torch.arange(0, turning, 2, dtype=torch.float64)
    frequency = 1.0 / rope["rope_theta"] ** (pair / turning)
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / rope["factor"]
    longest = getattr(config, "rotary_length", None) or config.max_position_embeddings
    if kind == "dynamic":
        # NTK: the base grows with the length beyond the original one.
        stretch = max(longest, config.max_position_embeddings) / config.max_position_embeddings
        grown = rope["factor"] * stretch - (rope["factor"] - 1)
        base = rope["rope_theta"] * grown ** (turning / (turning - 2))
        return 1.0 / base ** (pair / turning)
    if kind == "longrope":
        is_long = longest > rope["original_max_position_embeddings"]
        return frequency / torch.tensor(
            rope["long_factor" if is_long else "short_factor"], dtype=torch.float64
        )
    if kind != "llama3":
        raise ValueError(
            f"rope_type = {kind!r}: the reference knows default, linear, llama3, dynamic and longrope. Use "
            "one of them."
        )
    # Llama 3.1: low frequencies are divided by `factor`, high ones kept, and those between interpolated.
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / rope["factor"]


def rotary_factor(config: LlamaConfig) -> float:
    """What the channels that turn are multiplied by, of queries and keys; one but for longrope."""
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope":
        return 1.0
    original = rope["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))


def _micro_batch(
    weights: Weights,
    config: LlamaConfig,
    frozen: Frozen,
    batch: MicroBatch,
    rules: LossRules,
    rounding: float,
    guesses: Guesses,
) -> _Sums:
    length = len(batch.token_ids)
    dtype = weights["fc.weight"].dtype
    document = document_of(batch)
    target_of = torch.arange(len(frozen.d2t)) + frozen.d2t
    teacher_logits = batch.teacher.to(dtype) @ frozen.head.to(dtype).T
    best = teacher_logits.argmax(-1)
    covered = torch.isin(best, target_of)
    teacher = teacher_logits[:, target_of].softmax(-1)

    rows: list[tuple[Tensor, ...]] = []
    all_right = all_counted = may_be_right = torch.ones(length, dtype=torch.bool)
    all_accepted = torch.ones(length, dtype=dtype)
    any_tied = ~all_right
    for k, logits in enumerate(guesses(weights, config, frozen, batch, rules.ttt_steps)):
        read, _ = read_ahead(document, 1 + k)
        supervised = is_supervised(batch, rules.alignment, k)
        right = supervised & (target_of[logits.argmax(-1)] == best[read])
        all_right, all_counted = all_right & right, all_counted & supervised
        contributing = supervised & covered[read]
        entropy, accepted = of_guesses(logits, teacher[read], rules)
        # Nothing that the draft vocabulary cannot say is accepted.
        all_accepted = all_accepted * torch.where(contributing, accepted.detach(), 0.0)
        tied = supervised & _is_decided_by_rounding(logits, target_of, best[read], rounding)
        may_be_right, any_tied = may_be_right & (right | tied), any_tied | tied
        flags = (contributing, right, supervised, all_right, all_counted, tied, may_be_right & any_tied)
        joint_accepted = all_accepted[all_counted].sum()
        rows.append((entropy[contributing].sum(), *(flag.sum() for flag in flags), joint_accepted))
    slots = length if batch.anchors is None else int(batch.anchors.sum())
    return _Sums(slots, *(torch.stack(column) for column in zip(*rows, strict=True)))


def of_guesses(logits: Tensor, teacher: Tensor, rules: LossRules) -> tuple[Tensor, Tensor]:
    """The loss of each slot's guess [L] and the probability that it is accepted [L], from the draft's logits
    and the teacher's probabilities, [L, Vd] each.

    Raises:
        ValueError: docs/semantics.md does not define this kind of loss.
    """
    log_draft = logits.log_softmax(-1)
    cross_entropy = -(teacher * log_draft).sum(-1)
    accepted = torch.minimum(teacher, log_draft.exp()).sum(-1)
    if rules.kind == "kl":
        return cross_entropy, accepted
    if rules.kind == "tv":
        return 1 - accepted, accepted
    if rules.kind == "lk_alpha":
        return -accepted.log(), accepted
    if rules.kind != "lk_lambda":
        raise ValueError(f"kind = {rules.kind!r}: the reference knows kl, tv, lk_alpha and lk_lambda.")
    blend = (-rules.lk_eta * accepted).exp().detach()
    divergence = cross_entropy + (teacher * teacher.log()).sum(-1)
    return blend * divergence + (1 - blend) * (1 - accepted), accepted


def _is_decided_by_rounding(logits: Tensor, target_of: Tensor, best: Tensor, rounding: float) -> Tensor:
    """bool [L]: whether the two largest logits differ by less than `rounding` times the largest, and one of
    them is the teacher's token.
    """
    value, draft_id = logits.topk(2)
    close = value[:, 0] - value[:, 1] < rounding * value[:, 0].abs()
    return close & (target_of[draft_id] == best[:, None]).any(-1)


def read_ahead(document: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """For each slot, the index of the slot `ahead` of it, and whether that is in the same document; if not,
    the index is the slot's own. [L] each.
    """
    index = torch.arange(len(document))
    read = (index + ahead).clamp(max=len(document) - 1)
    inside = (index + ahead < len(document)) & (document[read] == document)
    return torch.where(inside, read, index), inside


def is_supervised(batch: MicroBatch, alignment: str, guess: int) -> Tensor:
    """bool [L]: whether each slot counts at a guess, by the rule that `loss.mask_alignment` names."""
    document = document_of(batch)
    read, inside = read_ahead(document, 1 + guess)
    if alignment == "predicted":
        # The token that is guessed, and the newest one that is known.
        guessed, inside = read_ahead(document, 2 + guess)
        counts = inside & batch.loss_mask[guessed] & batch.loss_mask[read_ahead(document, 1)[0]]
    else:
        counts = inside & batch.loss_mask[read if alignment == "served" else read - 1]
    return counts if batch.anchors is None else counts & batch.anchors


def document_of(batch: MicroBatch) -> Tensor:
    """The number of each slot's document, int64 [L]."""
    return torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))


def unroll(
    weights: Weights, config: LlamaConfig, frozen: Frozen, batch: MicroBatch, steps: int
) -> list[Tensor]:
    """Draft logits [L, Vd] of each TTT step of EAGLE-3."""
    document = document_of(batch)
    dtype = weights["fc.weight"].dtype
    index = torch.arange(len(document))
    first = torch.tensor([int((document < d).sum()) for d in document])
    may_attend = (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
    frequency = rotary_frequencies(config)
    hidden = normed_aux(weights, config, batch.aux.to(dtype)) @ weights["fc.weight"].T
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.num_hidden_layers)]
    logits = []
    for k in range(steps):
        read, inside = read_ahead(document, 1 + k)
        # A slot that would read outside its document reads zeros, and is not supervised.
        embeds = frozen.embedding.to(dtype)[batch.token_ids[read]] * inside[:, None]
        angle = ((index - first + k)[:, None] * frequency).to(dtype)
        # The k diagonals count as the newest k keys of the window.
        near = index[:, None] + k - index[None, :] < (
            getattr(config, "sliding_window", None) or len(index) + steps
        )
        for layer, keys_values in enumerate(seen):
            hidden = _layer(weights, config, layer, embeds, hidden, angle, may_attend & near, keys_values)
        normed = rms_norm(hidden, weights["norm.weight"], config)
        logits.append(normed @ weights["lm_head.weight"].T)
        if getattr(config, "norm_output", False):
            hidden = normed
    return logits


def normed_aux(weights: Weights, config: LlamaConfig, aux: Tensor) -> Tensor:
    """Apply the norms that come before `fc` to the captured hidden states [L, layers * H]; same shape."""
    if getattr(config, "norm_before_fc", False):
        aux = rms_norm(aux, weights["input_norm.weight"], config)
    if getattr(config, "fc_norm", False):
        parts = aux.chunk(config.num_aux_layers, dim=-1)
        normed = [rms_norm(part, weights[f"fc_norm.{i}.weight"], config) for i, part in enumerate(parts)]
        aux = torch.cat(normed, dim=-1)
    return aux


def _layer(
    weights: Weights,
    config: LlamaConfig,
    layer: int,
    embeds: Tensor,
    hidden: Tensor,
    angle: Tensor,
    may_attend: Tensor,
    keys_values: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """One decoder layer at one TTT step: [L, H] -> [L, H]. Appends this step's keys and values."""
    q, k, v = before_attention(weights, config, layer, embeds, hidden, angle)
    group = config.num_attention_heads // config.num_key_value_heads
    keys_values.append((k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)))
    attended = _attention(q, keys_values, may_attend).transpose(0, 1).flatten(1)
    return after_attention(weights, config, layer, hidden, attended)


def before_attention(
    weights: Weights, config: LlamaConfig, layer: int, embeds: Tensor, hidden: Tensor, angle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of n slots, embeds and hidden [n, H], angle [n, R / 2]: rotated q [Hq, n, D], rotated k and v
    [Hkv, n, D].
    """

    def weight(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}.weight"]

    if layer == 0:
        normed = (
            rms_norm(embeds, weight("input_layernorm"), config),
            rms_norm(hidden, weight("hidden_norm"), config),
        )
        x = torch.cat(normed, dim=-1)
    else:
        x = rms_norm(hidden, weight("input_layernorm"), config)
    q, k, v = (
        (x @ weight(f"self_attn.{name}_proj").T).view(len(x), -1, config.head_dim).transpose(0, 1)
        for name in "qkv"
    )
    q, k = (rotate(x, angle, rotary_factor(config)) for x in (q, k))
    return q, k, v


def after_attention(
    weights: Weights, config: LlamaConfig, layer: int, hidden: Tensor, attended: Tensor
) -> Tensor:
    """Of n slots: output projection, residual and MLP; hidden [n, H], attended [n, Hq * D] -> [n, H]."""

    def weight(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}.weight"]

    if layer == 0 and getattr(config, "norm_before_residual", False):
        hidden = rms_norm(hidden, weight("hidden_norm"), config)
    hidden = hidden + attended @ weight("self_attn.o_proj").T
    normed_hidden = rms_norm(hidden, weight("post_attention_layernorm"), config)
    gate, up = (normed_hidden @ weight(f"mlp.{name}_proj").T for name in ("gate", "up"))
    return hidden + (functional.silu(gate) * up) @ weight("mlp.down_proj").T


def _attention(q: Tensor, keys_values: list[tuple[Tensor, Tensor]], may_attend: Tensor) -> Tensor:
    """Attention with one softmax over the keys of step 0 and, of each later step, the key of the same slot:
    [Hq, L, D] -> [Hq, L, D].
    """
    scale = q.shape[-1] ** -0.5
    (k0, v0), *later = keys_values
    scores = (q @ k0.transpose(1, 2) * scale).masked_fill(~may_attend, -math.inf)
    diagonal = [(q * k).sum(-1, keepdim=True) * scale for k, _ in later]
    probability = torch.cat([scores, *diagonal], dim=-1).softmax(-1)
    length = len(may_attend)
    out = probability[..., :length] @ v0
    for s, (_, v) in enumerate(later):
        out = out + probability[..., length + s, None] * v
    return out


def rotate(x: Tensor, angle: Tensor, factor: float) -> Tensor:
    """Llama's rotary embedding of the first R channels of x [heads, L, D] by angle [L, R / 2]: pairs
    channels c and c + R / 2; the channels after R stay as they are.
    """
    half = angle.shape[-1]
    first, second, still = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.cat((first * cos - second * sin, second * cos + first * sin, still), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, config: LlamaConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def _global_norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
