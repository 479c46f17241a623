"""The contract between eagle3_ds and a draft algorithm: everything that the rest of the program asks of one.

An algorithm is a folder in `eagle3_ds/algorithms` with one object that implements `DraftAlgorithm`, and one
entry in the dictionary there. docs/extending.md explains how to add one.

Legend: S slots of this rank, the first Q of them live, K guesses of a slot, H hidden size, A entries of a
slot's captured hidden states, V the target's vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import LlamaConfig

from eagle3_ds.config import Recipe
from eagle3_ds.costs import DraftShape
from eagle3_ds.draft.vocabulary import VocabularyMap
from eagle3_ds.layout import Anchors, LocalBatch, Supervision

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReadText:
    """A piece of text as a draft will read it, whole, on the host.

    Attributes:
        aux: [N, A], the captured hidden states of its slots.
        tokens: int64 [N], for each slot the token one place after it.
        follows: bool [N], whether the next slot is of the same document.
        vocabulary: int64 [Vd], the target's ids of the draft's vocabulary.
    """

    aux: Tensor
    tokens: Tensor
    follows: Tensor
    vocabulary: Tensor


class Draft(nn.Module):
    """The weights of a draft, and the pass over a packed sequence that trains them.

    Its attention layers are modules with `q_proj`, `k_proj`, `v_proj`, `o_proj` and `head_dim`, by which
    `patch_attention` finds them. The token embedding is frozen: the target's, or the draft's own where its
    hidden size is another (draft/embedding.py). It is an argument instead of
    a parameter, so that it stays out of checkpoints, optimizer and ZeRO.

    Attributes:
        config: a Llama config with the extra key `draft_vocab_size`.
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
        """Run all guesses over the sequence, then return `finish(norm weight [H], head weight [Vd, H])`.

        The pass and `finish` are one call, because ZeRO-3 gathers the draft's weights when forward starts and
        releases them when it returns.

        Args:
            batch: this rank's slots.
            embedding: [V, H], frozen, on the device of the model.
            settings: the result of `DraftAlgorithm.settings`.
            on_guess: called for k = 0 .. K - 1 with the hidden state of guess k, [Q, H], before the final
                norm. The draft must go on with what it returns, because the loss adds its gradient there.
            finish: makes the result, usually the loss, from the weights of the final norm and of the head.
            anchor: a scalar zero whose gradient must be the last to be computed (docs/extending.md, "Three
                scalars that are zero").
        """
        raise NotImplementedError

    def start_from(self, embedding: Tensor) -> None:
        """Give fresh weights that begin as the target's their values; `embedding` [V, H] is what the draft
        reads. Most drafts have no such weights.
        """

    def look_up_from_start(self, text: ReadText, embedding: Tensor, head: Tensor) -> None:
        """Give fresh weights on the CPU values with which the draft looks up what followed in its context. It
        may draw from torch's default generator. Asked of algorithms whose recipes have `draft.start` alone.

        Args:
            text: a piece of what it will be trained on.
            embedding: [V, H], what the draft reads. head: [Vd, H], the target's rows of its vocabulary.
        """
        raise NotImplementedError

    def read_embedding(self, embedding: Tensor) -> Tensor:
        """What the draft reads of the frozen `embedding` [V, H], of the same shape; a draft that has learned
        rows of it puts them into a copy.
        """
        return embedding

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [S, H] -> [S, Vd]."""
        raise NotImplementedError


class Guesser(Protocol):
    """A served draft in the middle of one text: it takes verified slots and returns guesses."""

    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        """Take S newly verified slots and guess the next `count` tokens.

        Args:
            aux: [S, A], the target's captured hidden states of the slots.
            tokens: S token ids: for each slot, the token one place after it.
            count: how many tokens to guess.

        Returns:
            `count` ids of the target's vocabulary.
        """


class BatchGuesser(Protocol):
    """A served draft in the middle of several texts, each with a number."""

    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        """As `Guesser.propose`, for those texts that `tokens` names; the others wait, or have ended.

        Returns:
            {text: its `count` guesses}.
        """


class LayoutForm(Protocol):
    """How one layout of exported checkpoints (e.g. vLLM's) names the config keys and the tensors of a draft
    of this algorithm.
    """

    @property
    def architecture(self) -> str:
        """The entry of config.json's `architectures`."""

    def decoder_keys(self, config: LlamaConfig) -> dict[str, Any]:
        """What differs of the decoder's keys from those of a Llama."""

    def layer_keys(self, config: LlamaConfig, aux_layers: Sequence[int] | None) -> dict[str, Any]:
        """The keys that name captured layers, which are None if they are the rule's.

        Raises:
            ValueError: the draft was made for other layers.
        """

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        """Whether a config.json of the layout, `keys`, is that of a draft of this algorithm."""

    def brings_embedding(self, config: LlamaConfig) -> bool:
        """Whether a draft's export holds an embedding [V, H]; without one servers share the target's."""

    def keys(self, config: LlamaConfig) -> dict[str, Any]:
        """The config keys of the layout that go beyond the decoder's geometry."""

    def config_keys(self, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inverse of `keys`: entries of our own config, from the layout's keys and tensors.

        Raises:
            ValueError: the draft computes something that ours cannot.
        """

    def tensors_there(
        self, state: Mapping[str, Tensor], config: LlamaConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        """A draft's tensors by the names of the layout, the vocabulary map left out.

        Args:
            state: whole weights, by the draft's names.
            config: the draft's.
            embedding: [V, H], what the draft is given in training; None where `brings_embedding` is false.
        """

    def tensors_here(self, tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
        """The inverse of `tensors_there`: the weights alone, by the draft's names.

        Raises:
            ValueError: a tensor is missing whose place no weight could take.
        """


class DraftAlgorithm(Protocol):
    """A draft algorithm, for example EAGLE-3."""

    @property
    def name(self) -> str:
        """The value of the recipe's `draft.algorithm`."""

    @property
    def layouts(self) -> Mapping[str, LayoutForm]:
        """The layouts by the names of the recipe's `export.formats`."""

    @property
    def served_by_vllm(self) -> Mapping[str, Any]:
        """What vLLM's `--speculative-config` says beside the draft's place and its number of guesses."""

    @property
    def served_by_sglang(self) -> bool:
        """Whether SGLang serves such drafts, by its algorithm EAGLE3."""

    def build_config(self, target_config: Any, recipe: Recipe) -> LlamaConfig:
        """The draft's config from the target's (text) config and the recipe.

        Raises:
            ValueError: sizes do not fit each other.
        """

    def notes(self, target_config: Any, recipe: Recipe) -> list[str]:
        """What of the draft's shape is neither the recipe's nor plainly the target's, a line each."""

    def warnings_of_text(self, config: LlamaConfig, counts: Tensor) -> list[str]:
        """What the run's texts do that such a draft should not meet, a line each.

        Args:
            config: the draft's.
            counts: int64 [V], how often each token is supervised.
        """

    def build(self, config: LlamaConfig) -> Draft:
        """A draft with fresh weights, drawn from torch's default generator."""

    def supervision(self, recipe: Recipe) -> Supervision:
        """The rule that says which slots enter the loss at which guess, and how far a slot reads ahead."""

    def anchors(self, recipe: Recipe) -> Anchors | None:
        """What chooses the slots of training that enter the loss this time; None for all that are supervised,
        which held-out evaluation takes always. A pure function, the same for any mesh and packing.
        """

    def live_slots_alone(self, recipe: Recipe) -> bool:
        """Whether slots that are not live give only their step-0 keys and values (layout/plan.py)."""

    def settings(self, recipe: Recipe) -> Any:
        """The settings of the recipe that `Draft.forward` needs, in any form."""

    def shape(self, config: LlamaConfig) -> DraftShape:
        """The draft's sizes and costs, for the planner."""

    def guesser(self, draft: Any, embedding: Tensor, vocabulary: VocabularyMap) -> Guesser:
        """The draft as a server runs it, at the start of a text. `embedding` [V, H] is that of the draft."""

    def batch_guesser(
        self, draft: Any, embedding: Tensor, vocabulary: VocabularyMap, num_texts: int
    ) -> BatchGuesser:
        """The same at the start of texts 0 .. `num_texts` - 1. `draft.served.OneByOne` makes it of `guesser`
        where an algorithm has no faster way.
        """

    def probe(self, draft: Any, seed: int) -> Tensor:
        """Logits [n, Vd] of the served draft for an input made from `seed`, in the draft's dtype, on the CPU.

        An export is verified by loading it again and comparing its probe with this one.
        """
