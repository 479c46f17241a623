"""The EAGLE-3 draft and its unroll over the TTT steps (section 3 of the paper; docs/semantics.md).

Legend: S slots of this rank, the first Q of them live, E rows of its extended buffers, K TTT steps, H hidden
size, Ht the target's, V its vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_ds.algorithms.eagle3.layer import DraftLayer
from eagle3_ds.algorithms.eagle3.lookup import wire_lookup
from eagle3_ds.algorithms.eagle3.step import Activation, LayerUnroll, StepConstants, ttt_step
from eagle3_ds.algorithms.eagle3.variants import flag, prepare_aux
from eagle3_ds.attention.rotary import rotary_frequencies
from eagle3_ds.draft import Draft, ReadText, aux_size
from eagle3_ds.draft.decoder import rms_norm
from eagle3_ds.draft.decoder_backward import normed_in_tiles
from eagle3_ds.draft.geometry import num_aux_layers
from eagle3_ds.draft.offload import HostStash
from eagle3_ds.draft.served import DraftBatchCache, DraftCache
from eagle3_ds.draft.stream import stream_aux
from eagle3_ds.layout import LocalBatch

Result = TypeVar("Result")


@dataclass(frozen=True)
class UnrollSettings:
    """How the TTT steps are run.

    Attributes:
        ttt_steps: K.
        activation: what a step keeps for backward (step.py).
        tile_bytes: budget of the temporary tensors of one tile of slots.
    """

    ttt_steps: int
    activation: Activation
    tile_bytes: int


class DraftModel(Draft):
    """fc, the decoder layers, the final norm and the head over the draft vocabulary, and the norms of the
    variants (variants.py). See `Draft`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        if flag(config, "norm_before_fc"):
            self.input_norm = LlamaRMSNorm(aux_size(config), eps=config.rms_norm_eps)
        if flag(config, "fc_norm"):
            width, layers = aux_size(config) // num_aux_layers(config), range(num_aux_layers(config))
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(width, eps=config.rms_norm_eps) for _ in layers)
        self.fc = nn.Linear(aux_size(config), config.hidden_size, bias=False)
        self.layers = nn.ModuleList(DraftLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def look_up_from_start(self, text: ReadText, embedding: Tensor, head: Tensor) -> None:
        """As `Draft.look_up_from_start` (lookup.py)."""
        wire_lookup(self, text, embedding, head)

    def forward(
        self,
        batch: LocalBatch,
        embedding: Tensor,
        settings: UnrollSettings,
        on_guess: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Result],
        anchor: Tensor | None = None,
    ) -> Result:
        """Run the K steps, then return `finish(norm weight [H], head weight [Vd, H])`. See `Draft.forward`.

        The attention layers must be patched (`patch_attention`).

        Args:
            batch: this rank's slots.
            embedding: [V, H], frozen, on the device of the model.
            settings: how the steps are run.
            on_guess: called with each step's output, [Q, H], before the final norm; the next step reads what
                it returns.
            finish: makes the result.
            anchor: a scalar zero (docs/extending.md, "Three scalars that are zero").
        """
        self.unroll(batch, embedding, settings, on_guess, anchor)
        return finish(self.norm.weight, self.lm_head.weight)

    def unroll(
        self,
        batch: LocalBatch,
        embedding: Tensor,
        settings: UnrollSettings,
        on_guess: Callable[[Tensor], Tensor],
        anchor: Tensor | None = None,
    ) -> None:
        """Run the K steps and call `on_guess` with each output; the arguments are those of `forward`."""
        device = embedding.device
        unrolls = self._unrolls(batch, settings, device)
        rotary = rotary_frequencies(self.config, device)
        position = batch.position.to(device)
        norms = (prepare_aux(self.config), self._aux_norms())
        hidden, _ = stream_aux(batch.aux, self.fc.weight, settings.tile_bytes, anchor, *norms)
        for step in range(settings.ttt_steps):
            slots = slice(len(hidden))
            tokens = batch.token_ids[batch.row[slots] + 1 + step].to(device)
            constants = StepConstants(tokens, rotary_positions(position[slots], step), embedding, rotary)
            for layer, unroll in zip(self.layers, unrolls, strict=True):
                assert isinstance(layer, DraftLayer)
                hidden = ttt_step(layer, hidden, constants, unroll, settings.activation, settings.tile_bytes)
            hidden = on_guess(hidden)
            if step + 1 < settings.ttt_steps:
                hidden = self._passed_on(hidden)
        release_tickets(unrolls)

    def _unrolls(
        self, batch: LocalBatch, settings: UnrollSettings, device: torch.device
    ) -> list[LayerUnroll]:
        """What each layer keeps over the steps, empty yet."""
        stash = HostStash(device) if settings.activation == "offload" else None
        return [LayerUnroll(batch.plan, batch.ring_rank, stash=stash) for _ in self.layers]

    def project_aux(self, aux: Tensor) -> Tensor:
        """Serve: the hidden state of verified slots, aux [S, A] -> [S, H]."""
        prepare = prepare_aux(self.config)
        return self.fc(aux if prepare is None else prepare(aux, self._aux_norms()))

    def _aux_norms(self) -> list[Tensor]:
        """The weights that `prepare_aux` takes, in the order of `norm_sizes`."""
        before = [self.input_norm.weight] if flag(self.config, "norm_before_fc") else []
        return before + ([norm.weight for norm in self.fc_norm] if flag(self.config, "fc_norm") else [])

    def _passed_on(self, hidden: Tensor) -> Tensor:
        """What the next step reads of a step's output: [S, H] -> [S, H]."""
        if not flag(self.config, "norm_output"):
            return hidden
        return normed_in_tiles(hidden, self.norm.weight, self.config.rms_norm_eps)

    @torch.no_grad()
    def decode(
        self, embeds: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache | DraftBatchCache
    ) -> Tensor:
        """Serve the next S slots after the cached ones: embeds, hidden [S, H], positions int64 [S] ->
        [S, H].
        """
        cos, sin = rotary_frequencies(self.config, positions.device).angles(positions)
        for layer in self.layers:
            hidden = layer(embeds, hidden, cos, sin, cache)
        return hidden

    def passed_on(self, hidden: Tensor) -> Tensor:
        """Serve: what the next guess reads of `decode`'s output, [S, H] -> [S, H]."""
        return self._passed_on(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [S, H] -> [S, Vd]."""
        return self.lm_head(rms_norm(hidden, self.norm.weight, self.config.rms_norm_eps))


def release_tickets(unrolls: Sequence[LayerUnroll]) -> None:
    """Let the graph of a pass be freed. A ticket refers to the graph, whose nodes refer to the unroll; such a
    cycle runs through C++ nodes, which Python's garbage collector cannot free.
    """
    for unroll in unrolls:
        unroll.ticket = None


def rotary_positions(position: Tensor, step: int) -> Tensor:
    """RoPE positions of q and k at TTT step `step`, int64 [S]: at step k slot i stands at position i + k,
    because that is where a server makes guess k.
    """
    return position + step
