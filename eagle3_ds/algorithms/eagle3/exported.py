"""The layouts in which servers read an EAGLE-3 draft. vLLM and SGLang call its first layer `midlayer`; the
speculators library uses our names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.variants import FLAGS, flag
from eagle3_ds.draft.geometry import aux_keys, has_own_embedding, num_aux_layers, target_hidden_size

logger = logging.getLogger(__name__)

AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
EMBEDDING = "embed_tokens.weight"
MASK_TOKENS = ("ptd_token_id", "pard_token", "mask_token_id")
"""The keys in which vLLM looks for the mask token of parallel drafting, in its order."""
FIRST_HERE, FIRST_THERE = "layers.0.", "midlayer."


class _Named:
    """Tensors that have other names there, and nothing else."""

    def name_there(self, name: str) -> str:
        """The name in the layout of the tensor that we call `name`."""
        return name

    def name_here(self, name: str) -> str:
        """The inverse of `name_there`."""
        return name

    def tensors_there(
        self, state: Mapping[str, Tensor], config: LlamaConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        own = {} if embedding is None else {EMBEDDING: embedding}
        return {self.name_there(name): tensor for name, tensor in state.items()} | own

    def tensors_here(self, tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
        return {self.name_here(name): tensor for name, tensor in tensors.items() if name != EMBEDDING}


class ServerForm(_Named):
    """The layout that vLLM and SGLang load."""

    architecture = "LlamaForCausalLMEagle3"

    def decoder_keys(self, config: LlamaConfig) -> dict[str, Any]:
        return {}

    def layer_keys(self, config: LlamaConfig, aux_layers: Sequence[int] | None) -> dict[str, Any]:
        """vLLM's key, at the top, and SGLang's, in `eagle_config`, which names a layer by its output."""
        if aux_layers is None:
            return {}
        outputs = [layer - 1 for layer in aux_layers]
        nested = {"use_aux_hidden_state": True, AUX_LAYERS: outputs}
        return {AUX_LAYERS: list(aux_layers), "eagle_config": nested}

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        """The flags, the number of captured layers if it is not three, which vLLM assumes, and the target's
        hidden size if it is not the draft's.
        """
        num_layers = num_aux_layers(config)
        counted = {} if num_layers == 3 else {"num_aux_hidden_states": num_layers}
        return counted | _target_size(config) | {name: True for name in FLAGS if flag(config, name)}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return _captured(keys["hidden_size"], keys, tensors) | _flags(keys, tensors)

    def name_there(self, name: str) -> str:
        return FIRST_THERE + name.removeprefix(FIRST_HERE) if name.startswith(FIRST_HERE) else name

    def name_here(self, name: str) -> str:
        return FIRST_HERE + name.removeprefix(FIRST_THERE) if name.startswith(FIRST_THERE) else name

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        """By the architecture; with a mask token vLLM drafts in parallel, which is another algorithm's."""
        masked = any(keys.get(key) is not None for key in MASK_TOKENS)
        return keys.get("architectures") == [self.architecture] and not masked

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Only one of another width: servers share the target's."""
        return has_own_embedding(config)


class SpeculatorsForm(_Named):
    """The layout of the speculators library."""

    architecture = "Eagle3DraftModel"
    config_class = "Eagle3SpeculatorConfig"

    def decoder_keys(self, config: LlamaConfig) -> dict[str, Any]:
        return {}

    def layer_keys(self, config: LlamaConfig, aux_layers: Sequence[int] | None) -> dict[str, Any]:
        return {} if aux_layers is None else {AUX_LAYERS: list(aux_layers)}

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        """The class of the config, for transformers; all flags, also the false ones: a server takes an absent
        `norm_before_residual` as true; and the target's hidden size if it is not the draft's.
        """
        if num_aux_layers(config) != 3:
            logger.warning(
                "speculators layout: vLLM 0.32 takes drafts of three captured layers only from it; the vLLM "
                "layout says how many this one has"
            )
        auto_map = {"auto_map": {"": f"config.{self.config_class}"}}
        return auto_map | _target_size(config) | {name: flag(config, name) for name in FLAGS}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return _captured(keys["transformer_layer_config"]["hidden_size"], keys, tensors) | _flags(
            keys, tensors
        )

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return keys.get("speculators_model_type") == "eagle3"

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Always: speculators' own drafts do."""
        return True


def _target_size(config: LlamaConfig) -> dict[str, int]:
    """The key from which servers know the width of the target's hidden states, if it is not the draft's."""
    return {"target_hidden_size": target_hidden_size(config)} if has_own_embedding(config) else {}


def _captured(hidden_size: int, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our keys for the captured layers, from the number of columns of `fc`, in either layout.

    Raises:
        ValueError: the columns are not a multiple of the target's hidden size.
    """
    width = int(keys.get("target_hidden_size") or hidden_size)
    columns = tensors["fc.weight"].shape[1]
    if columns % width:
        raise ValueError(
            f"fc.weight has {columns} columns, which are not hidden states of {width} side by side"
        )
    return aux_keys(columns // width, width)


def _flags(keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Our keys for the norms of a variant (variants.py).

    Raises:
        ValueError: a flag is set and its tensor is missing, or the reverse. A server would run with randomly
            initialised norms, or without them, and not complain.
    """
    nested = keys.get("eagle_config") or {}
    flags = {name: bool(nested.get(name, keys.get(name, False))) for name in FLAGS}
    for name, tensor in (("fc_norm", "fc_norm.0.weight"), ("norm_before_fc", "input_norm.weight")):
        if flags[name] != (tensor in tensors):
            there = "there" if tensor in tensors else "not there"
            raise ValueError(f"{name} is {flags[name]} and the tensor {tensor} is {there}")
    return flags
