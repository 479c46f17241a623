"""Sizes of well-known targets, for planning with a target that is not on this machine."""

from __future__ import annotations

from collections.abc import Mapping

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "num_layers",
)
# Sizes in the order of SIZES, from the target's config.json.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "llama3.1-8b": (4096, 14336, 32, 8, 128, 128256, 32),
    "llama3.1-70b": (8192, 28672, 64, 8, 128, 128256, 80),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 36),
    "qwen3-32b": (5120, 25600, 64, 8, 128, 151936, 64),
}
