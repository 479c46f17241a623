"""The config of an EAGLE-3 draft, derived from the target's."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.shape import head_sizes, mlp_width, norm_epsilon, rope_parameters
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import aux_keys
from eagle3_ds.draft.geometry import window_keys


def build_draft_config(
    target_config: Any, draft: DraftSection, num_aux_layers: int = 3, length: int | None = None
) -> LlamaConfig:
    """A Llama config for the draft: the recipe's sizes; where it says null the target's, or those of a rule
    (shape.py).

    Args:
        target_config: the target's (text) config from transformers.
        draft: the recipe's draft section.
        num_aux_layers: captured layers that `fc` reads side by side.
        length: tokens of the longest sequence that it is made for, which some rotary scalings depend on; None
            is the target's `max_position_embeddings`.

    Returns:
        A `LlamaConfig` with extra keys: `draft_vocab_size`, the flags of variants.py and those of
        draft/geometry.py.

    Raises:
        ValueError: the draft vocabulary is larger than the target's, the head counts do not divide, or the
            rotated part of a head is not whole pairs.
    """
    return _derive(target_config, draft, num_aux_layers, length)[0]


def draft_notes(target_config: Any, draft: DraftSection) -> list[str]:
    """What of the draft's shape is neither the recipe's nor plainly the target's, a line each."""
    return _derive(target_config, draft, 3, None)[1]


def _derive(
    target_config: Any, draft: DraftSection, num_aux_layers: int, length: int | None
) -> tuple[LlamaConfig, list[str]]:
    if draft.vocab_size > target_config.vocab_size:
        raise ValueError(
            f"draft.vocab_size = {draft.vocab_size} is larger than the target's vocabulary of "
            f"{target_config.vocab_size}: the draft predicts a subset of the target's tokens. Use at most "
            f"{target_config.vocab_size}."
        )
    notes: list[str] = []
    hidden = draft.hidden_size or target_config.hidden_size
    heads = head_sizes(target_config, draft, hidden, notes)
    config = LlamaConfig(
        vocab_size=target_config.vocab_size,
        draft_vocab_size=draft.vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp_width(target_config, draft, hidden, notes),
        num_hidden_layers=draft.num_layers,
        num_attention_heads=heads.num,
        num_key_value_heads=heads.num_kv,
        head_dim=heads.size,
        hidden_act="silu",
        max_position_embeddings=target_config.max_position_embeddings,
        rotary_length=length,
        rms_norm_eps=norm_epsilon(target_config, notes),
        rope_parameters=rope_parameters(target_config, draft, heads.size, notes),
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
    return config, notes
