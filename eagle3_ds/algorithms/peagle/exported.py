"""The layouts in which servers read a P-EAGLE draft: EAGLE-3's, with `mask_hidden` [1, 1, A], the id of the
mask token, and an embedding [V, H] whose row of that token is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import exported as eagle3
from eagle3_ds.algorithms.eagle3.exported import EMBEDDING, MASK_TOKENS
from eagle3_ds.algorithms.peagle.model import with_learned_row

MASK_EMBEDDING, MASK_HIDDEN = "mask_embedding", "mask_hidden"


class _Masked:
    """What both layouts have beside EAGLE-3's."""

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Always: a server without it would read the target's row of the mask token."""
        return True

    def tensors_there(
        self, state: Mapping[str, Tensor], config: LlamaConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        assert embedding is not None, "brings_embedding says so"
        tensors = {name: tensor for name, tensor in state.items() if name != MASK_EMBEDDING}
        own = with_learned_row(embedding, config.mask_token_id, state[MASK_EMBEDDING])
        tensors[MASK_HIDDEN] = tensors[MASK_HIDDEN].view(1, 1, -1)
        return super().tensors_there(tensors, config, own)  # type: ignore[misc]

    def tensors_here(self, tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
        """As `LayoutForm.tensors_here`.

        Raises:
            ValueError: the learned vectors are missing.
        """
        missing = [name for name in (MASK_HIDDEN, EMBEDDING) if name not in tensors]
        if missing:
            raise ValueError(f"it drafts in parallel and has no tensor {missing[0]}, which its masks need")
        state: dict[str, Tensor] = super().tensors_here(tensors, config)  # type: ignore[misc]
        state[MASK_HIDDEN] = state[MASK_HIDDEN].reshape(-1)
        return state | {MASK_EMBEDDING: tensors[EMBEDDING][config.mask_token_id].clone()}


class ServerForm(_Masked, eagle3.ServerForm):
    """The layout that vLLM loads. It knows a P-EAGLE draft by its mask token alone."""

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        named = keys.get("architectures") == [self.architecture]
        return named and any(keys.get(key) is not None for key in MASK_TOKENS)

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        return super().keys(config) | {MASK_TOKENS[0]: getattr(config, "mask_token_id", None)}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return super().config_keys(keys, tensors) | _mask_token(keys)


class SpeculatorsForm(_Masked, eagle3.SpeculatorsForm):
    """The layout of the speculators library."""

    architecture = "PEagleSpeculator"
    config_class = "PEagleSpeculatorConfig"

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return keys.get("speculators_model_type") == "peagle"

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        return super().keys(config) | {MASK_TOKENS[-1]: getattr(config, "mask_token_id", None)}

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return super().config_keys(keys, tensors) | _mask_token(keys)


def _mask_token(keys: Mapping[str, Any]) -> dict[str, int]:
    return {"mask_token_id": int(next(keys[key] for key in MASK_TOKENS if keys.get(key) is not None))}
