"""The weights of a DFlash draft, and its arithmetic as a server runs it (docs/dflash.md).

Legend: S slots, B inputs of a block, N inputs of several blocks, H hidden size, A entries of a slot's
captured hidden states, Hq / Hkv heads, D head size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_ds.algorithms.dflash.layer import BlockLayer
from eagle3_ds.algorithms.dflash.step import BlockSettings, block_tokens, run_layers
from eagle3_ds.attention.rotary import rotary_frequencies
from eagle3_ds.draft import Draft, aux_size
from eagle3_ds.draft.decoder import rms_norm
from eagle3_ds.draft.served import DraftBatchCache
from eagle3_ds.draft.stream import stream_aux
from eagle3_ds.layout import LocalBatch

Result = TypeVar("Result")


class DFlashModel(Draft):
    """fc and its norm, the decoder layers, the final norm, the head over the draft vocabulary, and the mask
    embedding of a draft that has its own. See `Draft`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(aux_size(config), config.hidden_size, bias=False)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.mask_embedding:
            self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
            nn.init.normal_(self.mask_embedding, std=config.initializer_range)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def forward(
        self,
        batch: LocalBatch,
        embedding: Tensor,
        settings: BlockSettings,
        on_guess: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Result],
        anchor: Tensor | None = None,
    ) -> Result:
        """Run the block of every anchor, then return `finish(norm weight [H], head weight [Vd, H])`. See
        `Draft.forward`; the attention layers must be patched (`patch_attention`).
        """
        device = embedding.device
        states, _ = stream_aux(batch.aux, self.fc.weight, settings.tile_bytes, anchor)
        tokens = block_tokens(batch, settings.block_size, self.config.mask_token_id, device)
        embeds = self.embed(tokens.flatten(), embedding).unflatten(0, tokens.shape)
        layers = [layer for layer in self.layers if isinstance(layer, BlockLayer)]
        rotary = rotary_frequencies(self.config, device)
        hidden = run_layers(layers, states, self.hidden_norm.weight, embeds, batch, rotary, settings)
        # Input 0 says nothing. Unbound, so that backward joins the gradients of all inputs at once.
        for guess in hidden.unbind(1)[1:]:
            on_guess(guess)
        return finish(self.norm.weight, self.lm_head.weight)

    @torch.no_grad()
    def start_from(self, embedding: Tensor) -> None:
        """As `Draft.start_from`: a mask embedding begins as the mask token's row of `embedding` [V, H]."""
        if self.config.mask_embedding:
            self.mask_embedding.copy_(embedding[self.config.mask_token_id])

    def embed(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Inputs of blocks: tokens int64 [N], embedding [V, H] -> [N, H]; the draft's own mask embedding
        stands for the mask token wherever it is.
        """
        rows = functional.embedding(tokens, embedding).to(self.fc.weight.dtype)
        if not self.config.mask_embedding:
            return rows
        return torch.where((tokens == self.config.mask_token_id)[:, None], self.mask_embedding, rows)

    def project_aux(self, aux: Tensor) -> Tensor:
        """The context of slots: aux [S, A] -> c [S, H], which every layer makes keys and values of."""
        return rms_norm(self.fc(aux), self.hidden_norm.weight, self.config.rms_norm_eps)

    @torch.no_grad()
    def take(self, aux: Tensor, positions: Tensor, cache: DraftBatchCache) -> None:
        """Serve: write the keys and values of verified slots, aux [S, A] at positions int64 [S], which are
        open in the cache.
        """
        context = self.project_aux(aux.to(self.fc.weight.dtype))
        cos, sin = rotary_frequencies(self.config, positions.device).angles(positions)
        for layer in self.layers:
            assert isinstance(layer, BlockLayer)
            cache.write(layer.self_attn.layer, *layer.keys_values(context, cos, sin))

    @torch.no_grad()
    def decode(self, embeds: Tensor, positions: Tensor, cache: DraftBatchCache) -> Tensor:
        """Serve: blocks of embeds [N, H] at positions int64 [N], which are open in the cache -> [N, H]."""
        cos, sin = rotary_frequencies(self.config, positions.device).angles(positions)
        hidden = embeds
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [N, H] -> [N, Vd]."""
        return self.lm_head(rms_norm(hidden, self.norm.weight, self.config.rms_norm_eps))
