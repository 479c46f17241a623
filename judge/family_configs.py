"""A tiny config for each family of causal language models that transformers knows: its default config with
small sizes.

Sizes are recognised by their names, which families share; what does not fit together after that is corrected
by family.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 8
"""Enough for the rule of aux layers, (2, n // 2, n - 3), and for each kind of layer to come up."""
VOCABULARY = 101
WINDOW = 6
"""Of sliding windows and chunks: shorter than the documents, so that a wrong mask shows."""
SMALL = 16
LARGE = 64
"""A number above this is a size that no rule knows, and becomes `SMALL`."""
# The first pattern that a name matches as a whole, and the value it gets if its own is larger.
RULES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|embedding_size|dim_model|emb_dim", 64),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers", NUM_LAYERS),
    (r"(\w+_)?attention_heads|n_heads?|num_heads", 4),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"(\w+_)?head_dim", SMALL),
    (r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?ffn_dim|n_inner|d_ff|dim_ff|ffn_hidden_size", 96),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|original_max_position_embeddings", 256),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_routed_experts", 8),
    (r"num_experts_per_tok(en)?|(\w+_)?top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|num_expert_groups?", 1),
    (r"sliding_window|(\w+_)?window_size|attention_chunk_size", WINDOW),
    (r"(kv|q|o)_lora_rank", 32),
)
UNSET = {
    "head_dim": SMALL,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
"""Sizes that a config may leave open (None), and which the code of some families then misses."""
LATENT = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 24,
    "head_dim": 8,
}
"""Multi-head latent attention: keys of 24 channels, values of 8."""
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": SMALL, "mamba_d_ssm": 128}
"""State spaces: as many channels in all heads as twice the hidden size."""
FACTORS = {"logits_scaling": 4.0, "lm_head_multiplier": 0.375, "logit_scale": 0.0625}
"""What scales logits, where the default leaves them alone."""
SLIDE, FULL = "sliding_attention", "full_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHARED = {"layer_types": [SLIDE, SLIDE, SLIDE, FULL] * 2, "num_kv_shared_layers": 3}
"""The last layers take the keys of earlier ones, of their own kind."""
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# What does not fit together after that, by family.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": [SLIDE, SLIDE, SLIDE, FULL] * 2,
        "rope_parameters": {FULL: ROPE, SLIDE: ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dory": {
        "num_hidden_layers": 16,
        "n_input_layers": 4,
        "n_recurrent_layers": 8,
        "n_output_layers": 4,
        "layer_types": [SLIDE, "mlp", FULL, "mlp"] * 4,
    },
    "dots3_note": {
        "text_config": {"head_dim": 24},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 24},
    "gemma3n_text": SHARED,
    "gptj": {"rotary_dim": 8},
    "lfm2": {"layer_types": ["conv", "conv", "conv", FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "conv", FULL] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "mamba", "full_attention"] * 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48)},
    "whisper": {"max_target_positions": 64, "max_source_positions": 64},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 4, "hybrid_layer_ids": [1, 3, 5, 7]},
}


def families() -> list[str]:
    """The model types that transformers loads as causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a family with small sizes, or those of `changes`. Its errors are those of the family's
    own config.
    """
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    values = _shrink(default.to_dict(), _num_layers(default.to_dict()))
    for key in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
    return config_class(**_merge(values, {**CORRECTIONS.get(family, {}), **changes}))


def _num_layers(values: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
    return next((found for name in names if (found := values.get(name))), 0)


def _shrink(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("id2label", "label2id"):
            continue
        if key == "per_layer_config" and value:
            parts = {int(layer): part for layer, part in value.items()}
            kept = enumerate(_kept_layers(num_layers))
            small[key] = {new: _shrink(parts[old], 0) for new, old in kept if old in parts}
        elif isinstance(value, dict):
            small[key] = _shrink(value, _num_layers(value) or num_layers)
        elif isinstance(value, list | tuple) and len(value) == num_layers:
            small[key] = [value[layer] for layer in _kept_layers(num_layers)]
        else:
            small[key] = _smaller(key, value)
    if small.get("kv_lora_rank"):
        small |= {key: size for key, size in LATENT.items() if key in small}
    if "mamba_n_heads" in small:
        small |= {key: size for key, size in MAMBA.items() if key in small}
    small |= {key: factor for key, factor in FACTORS.items() if small.get(key) == 1.0}
    return small


def _kept_layers(num_layers: int) -> list[int]:
    """The layers that a small model has of a large one: the first and the last, so that each kind comes up
    and the last layer is what it is.
    """
    every = list(range(num_layers))
    return every if num_layers <= NUM_LAYERS else [*every[: NUM_LAYERS // 2], *every[-NUM_LAYERS // 2 :]]


def _smaller(key: str, value: Any) -> Any:
    if value is None:
        return UNSET.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in RULES:
        if re.fullmatch(pattern, key):
            return size if size == NUM_LAYERS and "layer" in key else min(value, size)
    if key.endswith("_token_id"):
        return min(value, 3)
    return SMALL if value > LARGE else value


def _merge(values: dict[str, Any], corrections: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in corrections.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
