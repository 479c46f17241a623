"""The config of an EAGLE-3 draft, derived from the target's."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from eagle3_ds.config import DraftSection
from eagle3_ds.draft import aux_keys
from eagle3_ds.draft.geometry import window_keys


def build_draft_config(
    target_config: Any, draft: DraftSection, num_aux_layers: int = 3, length: int | None = None
) -> LlamaConfig:
    """A Llama config for the draft: the target's width, rotary settings and norm epsilon, the recipe's own
    sizes.

    Args:
        target_config: the target's (text) config from transformers.
        draft: the recipe's draft section; null sizes are taken from the target.
        num_aux_layers: captured layers that `fc` reads side by side.
        length: tokens of the longest sequence that it is made for, which some rotary scalings depend on; None
            is the target's `max_position_embeddings`.

    Returns:
        A `LlamaConfig` with extra keys: `draft_vocab_size`, the flags of variants.py and those of
        draft/geometry.py.

    Raises:
        ValueError: the draft vocabulary is larger than the target's, or the key heads do not divide the query
            heads.
    """
    if draft.vocab_size > target_config.vocab_size:
        raise ValueError(
            f"draft.vocab_size = {draft.vocab_size} is larger than the target's vocabulary of "
            f"{target_config.vocab_size}: the draft predicts a subset of the target's tokens. Use at most "
            f"{target_config.vocab_size}."
        )
    num_heads = draft.num_heads or target_config.num_attention_heads
    num_kv_heads = draft.num_kv_heads or target_config.num_key_value_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"draft.num_heads = {num_heads} is not a multiple of draft.num_kv_heads = {num_kv_heads}: each "
            "key head serves the same number of query heads. Change one of them."
        )
    # Some targets have different rotary embeddings for full and for sliding attention. The draft takes that
    # of full attention, even if it has a window itself.
    rope = target_config.rope_parameters
    rope = rope if "rope_type" in rope else rope["full_attention"]
    head_dim = (
        getattr(target_config, "head_dim", None)
        or target_config.hidden_size // target_config.num_attention_heads
    )
    return LlamaConfig(
        vocab_size=target_config.vocab_size,
        draft_vocab_size=draft.vocab_size,
        hidden_size=target_config.hidden_size,
        intermediate_size=draft.intermediate_size or target_config.intermediate_size,
        num_hidden_layers=draft.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_act="silu",
        max_position_embeddings=target_config.max_position_embeddings,
        rotary_length=length,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_parameters=dict(rope),
        tie_word_embeddings=False,
        bos_token_id=getattr(target_config, "bos_token_id", None),
        eos_token_id=getattr(target_config, "eos_token_id", None),
        pad_token_id=getattr(target_config, "pad_token_id", None),
        attention_bias=False,
        mlp_bias=False,
        fc_norm=draft.aux_norm,
        norm_before_fc=draft.norm_before_fc,
        norm_before_residual=draft.norm_before_residual,
        norm_output=draft.norm_output,
        **aux_keys(num_aux_layers, target_config.hidden_size),
        **window_keys(draft.sliding_window, draft.num_layers),
    )
