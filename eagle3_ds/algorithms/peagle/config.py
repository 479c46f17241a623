"""The config of a P-EAGLE draft: EAGLE-3's, and the mask token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import config as eagle3
from eagle3_ds.algorithms.eagle3.shape import read
from eagle3_ds.config import DraftSection


def build_draft_config(
    target_config: Any, draft: DraftSection, num_aux_layers: int = 3, length: int | None = None
) -> LlamaConfig:
    """EAGLE-3's config (`eagle3.build_draft_config`, whose arguments these are) with `mask_token_id`.

    Raises:
        ValueError: as EAGLE-3's, or the mask token is none of the target's vocabulary.
    """
    config = eagle3.build_draft_config(target_config, draft, num_aux_layers, length)
    config.mask_token_id = mask_token(target_config, draft)[0]
    return config


def draft_notes(target_config: Any, draft: DraftSection) -> list[str]:
    """What of the draft is neither the recipe's nor plainly the target's, a line each."""
    _, why = mask_token(target_config, draft)
    return [*eagle3.draft_notes(target_config, draft), *([] if why is None else [why])]


def mask_token(target_config: Any, draft: DraftSection) -> tuple[int, str | None]:
    """The id of the mask token, and a line that says by which rule it was chosen; None for the recipe's own.

    Texts should not hold it, because where they do the draft reads the learned row instead of theirs. By rule
    it is the target's pad token, which documents laid end to end do not have, unless that token ends texts
    too; else the vocabulary's last, which most models keep in reserve or never use.

    Raises:
        ValueError: the recipe's id is none of the target's vocabulary.
    """
    size, chosen = target_config.vocab_size, draft.mask_token_id
    if chosen is not None:
        if chosen >= size:
            raise ValueError(
                f"draft.mask_token_id = {chosen} is not in the target's vocabulary of {size}: the mask token "
                f"has a row of the embedding. Use an id below {size} that no text holds, or null."
            )
        return chosen, None
    pad = read(target_config, "pad_token_id")
    if pad is not None and 0 <= pad < size and pad not in _borders(target_config):
        return pad, f"mask token {pad}, the target's pad token (draft.mask_token_id is null)"
    why = "it has no pad token" if pad is None else f"its pad token {pad} begins or ends texts"
    last = size - 1
    return (
        last,
        f"mask token {last}, the last of the target's vocabulary: {why} (draft.mask_token_id is null)",
    )


def mask_warnings(config: LlamaConfig, counts: Tensor) -> list[str]:
    """A line if answers hold the mask token; `counts` int64 [V] are of supervised tokens."""
    found = int(counts[config.mask_token_id])
    if not found:
        return []
    return [
        f"draft.mask_token_id: {found} of {int(counts.sum())} supervised tokens are the mask token "
        f"{config.mask_token_id}, whose row is learned: where a text holds it, the draft cannot tell it from "
        "a token that is not known. Name one that no text holds"
    ]


def _borders(target_config: Any) -> set[int | None]:
    """The tokens with which the target's texts begin and end."""
    named = (getattr(target_config, key, None) for key in ("bos_token_id", "eos_token_id"))
    return {token for ids in named for token in (ids if isinstance(ids, list | tuple) else [ids])}
