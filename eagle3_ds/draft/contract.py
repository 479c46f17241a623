"""The contract between the house and a draft algorithm: everything the house asks, and nothing that it need
not know.

An algorithm is a folder in `eagle3_ds/algorithms` with one object that keeps this contract, and one line in
the dictionary there. docs/extending.md shows the way.

Legend: S slots of this rank, the first Q of them live, K guesses of a slot, H hidden size, A entries of a
slot's captured hidden states, V the target's vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import LlamaConfig

from eagle3_ds.config import Recipe
from eagle3_ds.costs import DraftShape
from eagle3_ds.draft.vocabulary import VocabularyMap
from eagle3_ds.layout import LocalBatch, Supervision

Result = TypeVar("Result")


class Draft(nn.Module):
    """The weights of a draft, and the pass over a packed sequence that trains them.

    Its attention layers are modules with `q_proj`, `k_proj`, `v_proj`, `o_proj` and `head_dim`, so that
    `patch_attention` finds them. The token embedding is the target's, frozen: it is handed in, not owned, so
    that it stays out of checkpoints, optimizer and ZeRO.

    Attributes:
        config: its sizes, and `draft_vocab_size`.
        sp_ring_degree, sp_ulysses_degree, sp_world_size, sp_rank: the mesh, as RFC 338 names it; set by the
            patch.
    """

    config: LlamaConfig
    sp_ring_degree: int = 1
    sp_ulysses_degree: int = 1
    sp_world_size: int = 1
    sp_rank: int = 0

    def forward(
        self,
        batch: LocalBatch,
        embedding: Tensor,
        settings: Any,
        on_guess: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Result],
        anchor: Tensor | None = None,
    ) -> Result:
        """One pass, and what is made of it: `finish(final norm's weight [H], head's weight [Vd, H])`.

        All in one call, because under ZeRO-3 the draft is gathered when it starts and released when it
        returns.

        Args:
            batch: this rank's slots.
            embedding: [V, H], the target's, on the device of the model.
            settings: what `DraftAlgorithm.settings` made of the recipe.
            on_guess: called with each guess's hidden state in turn, [Q, H] before the final norm, k = 0 .. K
                - 1; what it returns goes on in its place. The loss adds its gradient there.
            anchor: a scalar whose (zero) gradient must be the last to be computed (docs/extending.md).
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, H], before the final norm -> [S, Vd]."""
        raise NotImplementedError


class Guesser(Protocol):
    """A served draft in the middle of one text: verified slots come in, guesses come out."""

    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        """Take in S verified slots and guess `count` tokens after them.

        Args:
            aux: [S, A], the target's captured hidden states of the slots.
            tokens: the S tokens one place later.

        Returns:
            Ids of the target's vocabulary.
        """


class LayoutForm(Protocol):
    """How one layout of checkpoints names a draft of this algorithm."""

    @property
    def architecture(self) -> str:
        """Of config.json's `architectures`."""

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        """The config keys that say more than the decoder's geometry does."""

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inverse, for our own config. Raises ValueError for a draft that computes otherwise than ours
        can.
        """

    def name_there(self, name: str) -> str:
        """A tensor's name in the layout, from ours."""

    def name_here(self, name: str) -> str:
        """The inverse."""


class DraftAlgorithm(Protocol):
    """A way to draft."""

    @property
    def name(self) -> str:
        """As the recipe's `draft.algorithm` says it."""

    @property
    def layouts(self) -> Mapping[str, LayoutForm]:
        """By the recipe's `export.formats`."""

    def build_config(self, target_config: Any, recipe: Recipe) -> LlamaConfig:
        """The draft's config from the target's (text) config and the recipe. Raises ValueError for sizes that
        do not fit each other."""

    def build(self, config: LlamaConfig) -> Draft:
        """A fresh draft, seeded by torch's generator."""

    def supervision(self, recipe: Recipe) -> Supervision:
        """Which slots count at which guess, and how far a slot reads ahead."""

    def live_slots_alone(self, recipe: Recipe) -> bool:
        """Whether slots that no loss reads give keys and values and nothing else (layout/plan.py)."""

    def settings(self, recipe: Recipe) -> Any:
        """What `Draft.forward` wants to know of the recipe."""

    def shape(self, config: LlamaConfig) -> DraftShape:
        """Sizes and costs, for the planner."""

    def guesser(self, draft: Any, embedding: Tensor, vocabulary: VocabularyMap) -> Guesser:
        """The draft as a server runs it, at the start of a text. `embedding`: [V, H], the target's."""

    def probe(self, draft: Any, seed: int) -> Tensor:
        """Logits [n, Vd] of the served draft on a fixed seeded input, in the draft's dtype, on the CPU. An
        export is believed once it gives the same."""
