"""The recipe's `draft`: the algorithm, the sizes of the model, and what it begins with."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from eagle3_ds.config.rope import RopeSection, check_rotated
from eagle3_ds.config.section import NonNegative, Positive, Section
from eagle3_ds.config.sizes import BLOCK_SIZE, TTT_STEPS, VOCABULARY
from eagle3_ds.config.target import check_grouping

KEYS_OF = {
    "eagle3": {"ttt_steps", "start", "aux_norm", "norm_before_fc", "norm_before_residual", "norm_output"},
    "peagle": {"ttt_steps", "mask_token_id", "aux_norm", "norm_before_fc", "norm_before_residual"},
    "dflash": {"block_size", "mask_token_id", "mask_embedding", "block_causal", "anchor_share"},
}
"""Keys of the draft section that not every algorithm has, by algorithm."""


def _keys_of_others(algorithm: str) -> set[str]:
    """Keys of the draft section that other algorithms have, and this one has not."""
    return set[str]().union(*KEYS_OF.values()) - KEYS_OF[algorithm]


class DraftSection(Section):
    algorithm: Literal["eagle3", "peagle", "dflash"] = "eagle3"
    """Name of a folder in eagle3_ds/algorithms."""
    vocab_size: Positive = VOCABULARY
    """Not given in a file: the target's where that is smaller (sizes.py)."""
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = TTT_STEPS
    """How many guesses of a slot are trained: steps of EAGLE-3's unroll, P-EAGLE's guesses in parallel."""
    block_size: Annotated[int, Field(ge=2, le=64)] = BLOCK_SIZE
    """DFlash: inputs of a block, the newest token and `block_size` - 1 masks, a guess for each mask."""
    mask_token_id: NonNegative | None = None
    """P-EAGLE and DFlash: the id that is fed where a token is yet to be guessed; P-EAGLE learns its row of
    the embedding, so no text should hold it. Null: the target's pad token if it does not begin or end texts,
    else the vocabulary's last.
    """
    mask_embedding: bool = False
    """DFlash: train an embedding for that id, instead of reading its row of the frozen embedding."""
    block_causal: bool = False
    """DFlash: an input of a block sees those up to its own, instead of all."""
    anchor_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """DFlash: the share of each document's candidates that draft a block in an epoch."""
    num_layers: Positive = 1
    hidden_size: Positive | None = None
    """Null: the target's. Another one gives the draft an embedding of its own, made from the target's."""
    intermediate_size: Positive | None = None
    """Null: the target's; three times `hidden_size` if the target has only experts, or no single width."""
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    """Channels of a head. Null: the target's if it is ordinary, else 128."""
    rope: RopeSection | None = None
    """Null: rotate whole heads, with the target's theta, and its scaling if servers have it for drafts."""
    aux_norm: bool = False
    """Apply a separate RMSNorm to each captured layer before `fc` (EAGLE-3.1)."""
    norm_before_fc: bool = False
    """Apply one RMSNorm to the concatenated captured layers, before `aux_norm` and `fc`."""
    norm_before_residual: bool = False
    """The first layer's residual is the hidden state after its norm instead of before it."""
    norm_output: bool = False
    """The next TTT step reads the draft's output after the final norm instead of before it (EAGLE-3.1)."""
    start: Literal["random", "lookup"] = "random"
    """The first weights. `lookup`: before it has learnt anything, the draft finds in its context what
    followed there, and its head is the target's.
    """
    sliding_window: Positive | None = None
    """How many keys a position of the draft attends to, its own included. Null: all up to its own."""

    @property
    def num_guesses(self) -> int:
        """K: the guesses of a slot."""
        return self.block_size - 1 if self.algorithm == "dflash" else self.ttt_steps

    @model_validator(mode="after")
    def _keys_of_the_algorithm(self) -> DraftSection:
        """A key that the algorithm does not have is refused, also with its default value."""
        strange = sorted(self.model_fields_set & _keys_of_others(self.algorithm))
        if strange:
            given = ", ".join(f"{key} is {json.dumps(getattr(self, key))}" for key in strange)
            having = [name for name, keys in KEYS_OF.items() if keys.issuperset(strange)]
            raise ValueError(
                f"{given} and algorithm is {self.algorithm!r}, whose drafts have no such thing"
                + (": a block of block_size makes block_size - 1 guesses" if "ttt_steps" in strange else "")
                + f". Remove {'it' if len(strange) == 1 else 'them'}"
                + (f", or set algorithm to {' or '.join(having)}." if having else ".")
            )
        return self

    @model_serializer(mode="wrap")
    def _only_keys_of_the_algorithm(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = _keys_of_others(self.algorithm)
        return {key: value for key, value in dump(self).items() if key not in others}

    @model_validator(mode="after")
    def _start_of_the_targets_width(self) -> DraftSection:
        if self.start == "lookup" and self.hidden_size is not None:
            raise ValueError(
                f"start is 'lookup' and hidden_size is {self.hidden_size}: such a draft begins with the "
                "target's head and reads its states as they are. Set hidden_size to null, or start to random."
            )
        return self

    @model_validator(mode="after")
    def _window_holds_the_guesses(self) -> DraftSection:
        is_block = self.algorithm == "dflash"
        # The last input of a block stands block_size places behind the newest slot of the context.
        name, least = ("block_size + 1", self.block_size + 1) if is_block else ("ttt_steps", self.ttt_steps)
        if self.sliding_window is not None and self.sliding_window < least:
            raise ValueError(
                f"sliding_window = {self.sliding_window} is less than {name} = {least}: a guess "
                "must at least see those before it. Use a window of thousands of tokens, or null for full "
                "attention."
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> DraftSection:
        if self.num_heads is not None and self.num_kv_heads is not None:
            check_grouping(self.num_heads, self.num_kv_heads)
        return self

    @model_validator(mode="after")
    def _pairs_of_channels(self) -> DraftSection:
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}, but it should be even: a rotary embedding turns pairs of "
                f"channels. Use {self.head_dim + 1}."
            )
        if self.head_dim is not None and self.rope is not None:
            check_rotated(self.head_dim, self.rope)
        return self
