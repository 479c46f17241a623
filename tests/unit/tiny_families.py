"""Random models of a few layers, one for each family of targets that is tested, small enough to be built in a
test.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AUX_LAYERS = (0, 1, 3)
"""Four layers are too few for the rule."""
SLIDE, FULL = "sliding_attention", "full_attention"
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
# family -> config class and what it has beside the sizes
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"sliding_window": 7, "layer_types": [SLIDE, SLIDE, FULL, SLIDE], "query_pre_attn_scalar": 20},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **EXPERTS}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}
# Families beside those: hybrid, linear, indexer caches; latent attention; logits that are scaled.
LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
INDEXER = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 8}
"""More keys than a test has tokens: scores tied at zero fall by the length of the text."""
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": ("MiniMaxConfig", {"num_local_experts": 4, "block_size": 8}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS, **DELTA},
    ),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 0.25, **MAMBA}),
    "jamba": ("JambaConfig", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "deepseek_v32": ("DeepseekV32Config", {**LATENT, **INDEXER}),
}


def other_config(family: str, **changes: Any) -> Any:
    name, more = OTHERS[family]
    return getattr(transformers, name)(**{**SIZES, **more, **changes})


def family_config(family: str, **changes: Any) -> Any:
    name, more = FAMILIES[family]
    return getattr(transformers, name)(**{**SIZES, **more, **changes})


def vision_language_config() -> Any:
    text = {**SIZES, "sliding_window": 7, "layer_types": [SLIDE, SLIDE, FULL, SLIDE]}
    return transformers.Gemma3Config(
        text_config=text, vision_config={**VISION, "patch_size": 14}, mm_tokens_per_image=4
    )


def random_model(config: Any, seed: int = 0) -> Any:
    """Weights of a size at which attention is far from uniform, and norms, biases and sinks that are not
    their defaults.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, *((0.0, 0.3) if parameter.dim() > 1 else (0.5, 0.3)))
    return model.requires_grad_(False).eval()
