"""The config of a DFlash draft, derived from the target's. Its sizes follow the rules of EAGLE-3's drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.config import build_draft_config, draft_notes
from eagle3_ds.config import DraftSection


def build_dflash_config(
    target_config: Any,
    draft: DraftSection,
    aux_layers: Sequence[int] | None = None,
    length: int | None = None,
) -> LlamaConfig:
    """The config of `build_draft_config`, with those of `dflash_keys` and the captured layers by name.

    Args:
        aux_layers: captured layers; None for the rule's, as in the recipe.
        The others as for `build_draft_config`.

    Raises:
        ValueError: as `build_draft_config`, or the mask token is none of the target's.
    """
    mask = mask_token(target_config, draft)
    layers = rule_of(target_config.num_hidden_layers) if aux_layers is None else tuple(aux_layers)
    config = build_draft_config(target_config, draft, len(layers), length)
    config.update({"aux_layers": list(layers)})
    config.update(dflash_keys(draft.block_size, mask, draft.mask_embedding, draft.block_causal))
    return config


def dflash_notes(target_config: Any, draft: DraftSection) -> list[str]:
    """Those of `draft_notes`, and the mask token where the recipe names none."""
    notes = draft_notes(target_config, draft)
    if draft.mask_token_id is None:
        notes.append(f"the mask token {mask_token(target_config, draft)}: draft.mask_token_id is null")
    return notes


def mask_token(target_config: Any, draft: DraftSection) -> int:
    """The id of the mask token: the recipe's, else the pad token if it does not begin or end texts,
    else the last id.

    Raises:
        ValueError: the recipe's is none of the target's vocabulary.
    """
    size = int(target_config.vocab_size)
    if draft.mask_token_id is None:
        pad = getattr(target_config, "pad_token_id", None)
        if isinstance(pad, int) and 0 <= pad < size and pad not in _borders(target_config):
            return pad
        return size - 1
    if draft.mask_token_id >= size:
        raise ValueError(
            f"draft.mask_token_id = {draft.mask_token_id} is not in the target's vocabulary of {size} "
            f"tokens, one of whose embeddings is fed for a mask. Use at most {size - 1}."
        )
    return draft.mask_token_id


def _borders(target_config: Any) -> set[int | None]:
    """The tokens with which the target's texts begin and end."""
    named = (getattr(target_config, key, None) for key in ("bos_token_id", "eos_token_id"))
    return {token for ids in named for token in (ids if isinstance(ids, list | tuple) else [ids])}


def rule_of(num_layers: int) -> tuple[int, ...]:
    """The layers that `target.aux_layers: null` captures of a target of so many."""
    return (2, num_layers // 2, num_layers - 3)


def dflash_keys(
    block_size: int, mask_token_id: int, mask_embedding: bool, block_causal: bool
) -> dict[str, Any]:
    """The config keys that a DFlash draft has beyond a decoder's."""
    return {
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "mask_embedding": mask_embedding,
        "block_causal": block_causal,
    }
