"""The config of a target that is not there yet, from its sizes."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import LlamaConfig

from eagle3_ds.config import TargetBuild


def llama_config(sizes: Mapping[str, int]) -> LlamaConfig:
    """`sizes` by the names of `target_sizes.SIZES`."""
    return LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        num_hidden_layers=sizes["num_layers"],
    )


def built_config(build: TargetBuild) -> LlamaConfig:
    """Sizes of the target that `target.build` will make."""
    config = llama_config({**build.model_dump(), "head_dim": build.hidden_size // build.num_heads})
    config.max_position_embeddings = build.max_positions
    return config
