"""What a draft takes over from its target's config, and the rules for what that config does not say.

A target's own shape may be anything: latent attention, experts, layers without attention, rotary embeddings
of part of a head. The draft is an ordinary Llama decoder beside it, so each function gives a size that
servers run, and tells where that is not plainly the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from eagle3_ds.config import PER_PAIR, SCALINGS, DraftSection, check_rotated

HEAD_DIM = 128
LARGEST_HEAD_DIM = 256
"""More channels than that are in no attention kernel for training."""
NUM_KV_HEADS = 8
MLP_FACTOR = 3
THETA = 10000.0
EPSILON = 1e-6
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config keys that count the experts of a layer."""
EPSILONS = ("rms_norm_eps", "layernorm_epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
NO_SETTINGS: Mapping[str, Any] = {}


class Heads(NamedTuple):
    """Channels of a head, query heads, key heads."""

    size: int
    num: int
    num_kv: int


def read(config: Any, name: str) -> Any:
    """A value of a target's config; None where it has none, or one for each layer and no common one."""
    try:
        value = getattr(config, name, None)
    except (RuntimeError, ValueError):  # transformers gives no common value of keys that differ by layer
        return None
    if isinstance(value, list | tuple):
        return value[0] if value and all(each == value[0] for each in value) else None
    return value


def has_latent_attention(config: Any) -> bool:
    """Whether keys and values come from a common narrow state (MLA), so that head sizes are not a cache's."""
    return read(config, "kv_lora_rank") is not None


def head_sizes(config: Any, draft: DraftSection, hidden: int, notes: list[str]) -> Heads:
    """The draft's heads: the recipe's, else the target's where its attention is ordinary, else by rule.

    By rule a head has 128 channels; there are as many query heads as fill `hidden`, the next lower divisor of
    it where they do not divide it, which a Llama config demands; and as many key heads as divide these, at
    most 8.

    Raises:
        ValueError: query heads that do not divide the hidden size, or key heads that do not divide them.
    """
    theirs, why = _ordinary_heads(config)
    size = draft.head_dim or (theirs.size if theirs else HEAD_DIM)
    by_rule = draft.num_heads is None and (theirs is None or hidden % theirs.num != 0)
    fitting = _largest_divisor(hidden, max(1, hidden // size))
    num = fitting if by_rule else draft.num_heads or (theirs.num if theirs else fitting)
    if theirs is None or (by_rule and num % theirs.num_kv):
        num_kv = draft.num_kv_heads or _largest_divisor(num, NUM_KV_HEADS)
    else:
        num_kv = draft.num_kv_heads or theirs.num_kv
    if num % num_kv:
        raise ValueError(
            f"draft.num_heads = {num} is not a multiple of draft.num_kv_heads = {num_kv}: each key head "
            "serves the same number of query heads. Change one of them."
        )
    if hidden % num:
        raise ValueError(
            f"draft.num_heads = {num} does not divide draft.hidden_size = {hidden}, which the Llama config "
            f"that servers read demands, whatever the head's size. Use {_largest_divisor(hidden, num)}."
        )
    if by_rule:
        why = why or f"its {theirs.num if theirs else 0} query heads do not divide the draft's hidden size"
        notes.append(f"{num} query heads and {num_kv} key heads of {size} channels, because {why}")
    elif theirs is None and draft.head_dim is None:
        notes.append(f"heads of {size} channels, because {why}")
    return Heads(size, num, num_kv)


def _ordinary_heads(config: Any) -> tuple[Heads | None, str]:
    """The target's heads, or None and why an ordinary decoder could not have them."""
    if has_latent_attention(config):
        return None, "the target's attention is latent (kv_lora_rank)"
    num = read(config, "num_attention_heads")
    if not num:
        return None, "the target's config has no attention heads"
    size = read(config, "head_dim")
    if size is None and not _differs_by_layer(config, "head_dim") and config.hidden_size % num == 0:
        size = config.hidden_size // num
    if size is None or size % 2 or size > LARGEST_HEAD_DIM:
        return None, (
            "the target has no one head size"
            if size is None
            else f"the target's heads of {size} channels are none that drafts are served with"
        )
    num_kv = read(config, "num_key_value_heads") or num
    return Heads(size, num, num_kv if num % num_kv == 0 else _largest_divisor(num, NUM_KV_HEADS)), ""


def _differs_by_layer(config: Any, name: str) -> bool:
    try:
        return isinstance(getattr(config, name, None), list | tuple)
    except (RuntimeError, ValueError):
        return True


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


def mlp_width(config: Any, draft: DraftSection, hidden: int, notes: list[str]) -> int:
    """The recipe's width; else the target's dense one; else three times `hidden`, never one expert's."""
    if draft.intermediate_size is not None:
        return draft.intermediate_size
    width, expert = read(config, "intermediate_size"), read(config, "moe_intermediate_size")
    has_experts = any((read(config, name) or 0) > 1 for name in EXPERTS)
    if has_experts and (expert is None or expert == width):
        # The one width that such a config gives is an expert's.
        width = read(config, "intermediate_size_mlp")
    if width is not None:
        return int(width)
    reason = "the target has experts and no dense MLP" if has_experts else "the target has no one MLP width"
    notes.append(f"intermediate_size {MLP_FACTOR * hidden}, {MLP_FACTOR} times the hidden size: {reason}")
    return MLP_FACTOR * hidden


def norm_epsilon(config: Any, notes: list[str]) -> float:
    """The target's; 1e-6 where its config has none."""
    for name in EPSILONS:
        value = read(config, name)
        if value is not None:
            return float(value)
    notes.append(f"norms with an epsilon of {EPSILON}: the target's config has none")
    return EPSILON


def rope_parameters(config: Any, draft: DraftSection, head_dim: int, notes: list[str]) -> dict[str, Any]:
    """The rotary settings as transformers and servers read them.

    Raises:
        ValueError: a rotated part that is odd or empty, or a scaling that does not fit it.
    """
    theirs = _full_attention_rope(config)
    theta = theirs.get("rope_theta") or read(config, "rope_theta")
    if theta is None:
        theta = THETA
        if draft.rope is None or draft.rope.theta is None:
            notes.append(f"a rotary embedding of theta {THETA:g}: the target has none")
    if draft.rope is None:
        return {"rope_theta": float(theta), **_mirrored_scaling(theirs, head_dim, notes)}
    rope = draft.rope
    check_rotated(head_dim, rope)
    partial = {"partial_rotary_factor": rope.partial_factor} if rope.partial_factor < 1 else {}
    return {
        "rope_theta": float(rope.theta or theta),
        "rope_type": "default",
        **(rope.scaling or {}),
        **partial,
    }


def _full_attention_rope(config: Any) -> Mapping[str, Any]:
    """The settings of full attention where kinds of layers differ, of another kind where none is of that."""
    parameters = getattr(config, "rope_parameters", None) or NO_SETTINGS
    parts = [part for part in parameters.values() if isinstance(part, Mapping)]
    if not parts or "rope_type" in parameters:
        return parameters
    return parameters.get("full_attention") or parameters.get("main") or parts[0]


def _mirrored_scaling(theirs: Mapping[str, Any], head_dim: int, notes: list[str]) -> dict[str, Any]:
    """The target's scaling in the keys that servers read; none if they have no such type."""
    kind = theirs.get("rope_type", "default")
    plain = {"rope_type": "default"}
    if theirs.get("partial_rotary_factor", 1.0) != 1.0:
        notes.append("a rotary embedding that turns whole heads; the target turns a part of each")
    if kind == "default":
        return plain
    keys = SCALINGS.get(kind)
    if keys is None or any(theirs.get(key) is None for key in keys.needed):
        notes.append(f"no rotary scaling: servers compute none of the target's type {kind!r} for drafts")
        return plain
    if any(len(theirs.get(key) or ()) not in (0, head_dim // 2) for key in PER_PAIR):
        notes.append(
            f"no rotary scaling: the target's {kind} numbers are for another size of heads than {head_dim}"
        )
        return plain
    kept = {key: theirs[key] for key in (*keys.needed, *keys.allowed) if theirs.get(key) is not None}
    return {"rope_type": kind, **kept}
