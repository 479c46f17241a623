"""How servers name an EAGLE-3 draft: vLLM and SGLang call its first layer `midlayer`, speculators as we
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

FIRST_HERE, FIRST_THERE = "layers.0.", "midlayer."


class ServerForm:
    """The layout that vLLM and SGLang load."""

    architecture = "LlamaForCausalLMEagle3"

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        return {}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {}

    def name_there(self, name: str) -> str:
        return FIRST_THERE + name.removeprefix(FIRST_HERE) if name.startswith(FIRST_HERE) else name

    def name_here(self, name: str) -> str:
        return FIRST_HERE + name.removeprefix(FIRST_THERE) if name.startswith(FIRST_THERE) else name


class SpeculatorsForm:
    """The layout of the speculators library."""

    architecture = "Eagle3DraftModel"

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        """Both flags are written: a server takes an absent `norm_before_residual` for true."""
        return {"norm_before_residual": False, "norm_before_fc": False}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        unlike = [name for name in ("norm_before_residual", "norm_before_fc") if keys.get(name)]
        if unlike:
            raise ValueError(f"it has {unlike[0]} true: such a draft computes otherwise than ours")
        return {}

    def name_there(self, name: str) -> str:
        return name

    def name_here(self, name: str) -> str:
        return name
