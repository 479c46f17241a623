"""The layouts in which servers read a DFlash draft: vLLM's own, and that of the speculators library.

Both use our tensor names, and both files say whether a block is causal: what a server assumes where they do
not is another thing in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.dflash.config import dflash_keys
from eagle3_ds.draft.geometry import (
    aux_keys,
    has_own_embedding,
    sliding_window,
    target_hidden_size,
)

EMBEDDING, MASK_EMBEDDING = "embed_tokens.weight", "mask_embedding"


class _Form:
    """What both layouts have in common."""

    architecture = "DFlashDraftModel"

    def decoder_keys(self, config: LlamaConfig) -> dict[str, Any]:
        """A decoder of Qwen3, whose norms of queries and keys this one has. Its config drops a window unless
        `use_sliding_window` is set.
        """
        window = {} if sliding_window(config) is None else {"use_sliding_window": True}
        return {"model_type": "qwen3", **window}

    def layer_keys(self, config: LlamaConfig, aux_layers: Sequence[int] | None) -> dict[str, Any]:
        """None more: `keys` names the captured layers, always.

        Raises:
            ValueError: the draft's config has other layers.
        """
        if aux_layers is not None and list(aux_layers) != list(config.aux_layers):
            raise ValueError(
                f"aux_layers is {list(aux_layers)}, the draft's config has {list(config.aux_layers)}. Export "
                "the draft with the layers that it was made for."
            )
        return {}

    def tensors_there(
        self, state: Mapping[str, Tensor], config: LlamaConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        """Our names. The mask embedding goes to a file of its own (export/folder.py)."""
        return dict(state) | ({} if embedding is None else {EMBEDDING: embedding})

    def tensors_here(self, tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}


class ServerForm(_Form):
    """vLLM's layout, which is that of z-lab's own drafts."""

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return keys.get("architectures") == [self.architecture]

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Only one of another width: vLLM shares the target's."""
        return has_own_embedding(config)

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        window = sliding_window(config)
        slides = {} if window is None else {"use_swa": True, "swa_window_size": window}
        return {
            **_target_size(config),
            "block_size": config.block_size,
            "dflash_config": {
                "mask_token_id": config.mask_token_id,
                # A layer is named by its output there.
                "target_layer_ids": [layer - 1 for layer in config.aux_layers],
                "causal": config.block_causal,
                **slides,
            },
        }

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        own = keys.get("dflash_config") or {}
        _refuse_anchor_sampling(own)
        for name in ("mask_token_id", "target_layer_ids", "causal"):
            if own.get(name) is None:
                raise ValueError(f"dflash_config says no {name}, without which its blocks are not known")
        layers = [layer + 1 for layer in own["target_layer_ids"]]
        return _config_keys(keys, keys["hidden_size"], layers, own["mask_token_id"], own["causal"], tensors)


class SpeculatorsForm(_Form):
    """The layout of the speculators library."""

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return keys.get("speculators_model_type") == "dflash"

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Always: speculators' own drafts do."""
        return True

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        return {
            "auto_map": {"": "config.DFlashSpeculatorConfig"},
            **_target_size(config),
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "aux_hidden_state_layer_ids": list(config.aux_layers),
            # vLLM takes this for every layer, with a window or without one.
            "sliding_window_non_causal": not config.block_causal,
            "sample_from_anchor": False,
        }

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        _refuse_anchor_sampling(keys)
        for name in ("mask_token_id", "aux_hidden_state_layer_ids", "sliding_window_non_causal"):
            if keys.get(name) is None:
                raise ValueError(f"the config says no {name}, without which its blocks are not known")
        return _config_keys(
            keys,
            keys["transformer_layer_config"]["hidden_size"],
            keys["aux_hidden_state_layer_ids"],
            keys["mask_token_id"],
            not keys["sliding_window_non_causal"],
            tensors,
        )


def _refuse_anchor_sampling(keys: Mapping[str, Any]) -> None:
    if keys.get("sample_from_anchor"):
        raise ValueError(
            "sample_from_anchor is true: the newest token of its block makes a guess too, and here none does"
        )


def _target_size(config: LlamaConfig) -> dict[str, int]:
    """The key from which servers know the width of the target's hidden states, if it is not the draft's."""
    return {"target_hidden_size": target_hidden_size(config)} if has_own_embedding(config) else {}


def _config_keys(
    keys: Mapping[str, Any],
    hidden_size: int,
    layers: Sequence[int],
    mask_token_id: int,
    causal: bool,
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Our keys, from what either layout says.

    Raises:
        ValueError: `fc` reads another number of layers than are named, or there is no block size.
    """
    width = int(keys.get("target_hidden_size") or hidden_size)
    columns = tensors["fc.weight"].shape[1]
    if columns != width * len(layers):
        raise ValueError(
            f"fc.weight has {columns} columns, which are not hidden states of {width} of {len(layers)} layers"
        )
    if keys.get("block_size") is None:
        raise ValueError("the config says no block_size")
    return {
        **aux_keys(len(layers), width),
        "aux_layers": list(layers),
        **dflash_keys(int(keys["block_size"]), int(mask_token_id), MASK_EMBEDDING in tensors, bool(causal)),
    }
