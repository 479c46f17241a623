"""The P-EAGLE draft and its K guesses, one after the other (docs/peagle.md).

Legend: S slots of this rank, the first Q of them live, K guesses, H hidden size, A entries of a slot's
captured hidden states, V the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3.layer import DraftLayer
from eagle3_ds.algorithms.eagle3.model import DraftModel, UnrollSettings, release_tickets, rotary_positions
from eagle3_ds.algorithms.eagle3.step import StepConstants, ttt_step
from eagle3_ds.algorithms.eagle3.variants import prepare_aux
from eagle3_ds.algorithms.peagle.step import Mask, first_layer_step
from eagle3_ds.attention.rotary import rotary_frequencies
from eagle3_ds.draft import aux_size
from eagle3_ds.draft.stream import stream_aux
from eagle3_ds.layout import LocalBatch


class PEagleModel(DraftModel):
    """EAGLE-3's weights and two learned vectors.

    Attributes:
        mask_embedding: [H], the mask token's row of the embedding.
        mask_hidden: [A], what masks have instead of captured hidden states.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.mask_hidden = nn.Parameter(torch.empty(aux_size(config)))
        for vector in (self.mask_embedding, self.mask_hidden):
            nn.init.normal_(vector)

    @torch.no_grad()
    def start_from(self, embedding: Tensor) -> None:
        """As `Draft.start_from`: the mask token's row begins as the embedding's [V, H]."""
        self.mask_embedding.copy_(embedding[self.config.mask_token_id])

    @torch.no_grad()
    def read_embedding(self, embedding: Tensor) -> Tensor:
        """As `Draft.read_embedding`: a copy of `embedding` [V, H] with the mask token's row learned."""
        return with_learned_row(embedding, self.config.mask_token_id, self.mask_embedding)

    def unroll(
        self,
        batch: LocalBatch,
        embedding: Tensor,
        settings: UnrollSettings,
        on_guess: Callable[[Tensor], Tensor],
        anchor: Tensor | None = None,
    ) -> None:
        """Make the K guesses and call `on_guess` with the output of each; the arguments are those of
        `forward`. No guess reads another's output.
        """
        device = embedding.device
        unrolls = self._unrolls(batch, settings, device)
        rotary = rotary_frequencies(self.config, device)
        position = batch.position.to(device)
        norms = (prepare_aux(self.config), self._aux_norms())
        hidden, projected = stream_aux(
            batch.aux, self.fc.weight, settings.tile_bytes, anchor, *norms, self.mask_hidden[None]
        )
        mask = Mask(self.config.mask_token_id, self.mask_embedding, projected[0])
        first, *later = zip(self.layers, unrolls, strict=True)
        how = (settings.activation, settings.tile_bytes)
        for guess in range(settings.ttt_steps):
            slots = slice(len(hidden))
            tokens = batch.token_ids[batch.row[slots] + 1].to(device)
            constants = StepConstants(tokens, rotary_positions(position[slots], guess), embedding, rotary)
            layer, unroll = first
            assert isinstance(layer, DraftLayer)
            hidden = first_layer_step(layer, hidden, constants, unroll, mask, *how)
            for layer, unroll in later:
                assert isinstance(layer, DraftLayer)
                hidden = ttt_step(layer, hidden, constants, unroll, *how)
            hidden = on_guess(hidden)
        release_tickets(unrolls)


def with_learned_row(embedding: Tensor, token: int, row: Tensor) -> Tensor:
    """A copy of `embedding` [V, H] whose row `token` is `row` [H], in the finer of the two dtypes."""
    own = embedding.to(torch.promote_types(embedding.dtype, row.dtype), copy=True)
    own[token] = row.detach().to(own.device, own.dtype)
    return own
