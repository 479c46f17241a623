"""The weights of a DFlash draft, and its arithmetic as a server runs it (docs/dflash.md).

Legend: S slots, B inputs of a block, N inputs of several blocks, H hidden size, A entries of a slot's
captured hidden states, Hq / Hkv heads, D head size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eagle3_ds.attention.rotary import rotary_frequencies, rotate
from eagle3_ds.draft import Draft, aux_size
from eagle3_ds.draft.decoder import AfterWeights, after_attention, project, rms_norm
from eagle3_ds.draft.served import DraftAttention, DraftBatchCache
from eagle3_ds.layout import LocalBatch

Result = TypeVar("Result")


class BlockAttention(DraftAttention):
    """The projections, and the norms of the channels of a head that follow those of queries and keys."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__(config, config.hidden_size, layer)
        self.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)


class BlockLayer(nn.Module):
    """A decoder layer that a block runs through, and that makes keys and values of the context.

    Attributes:
        causal: an input of a block sees those up to its own, instead of all.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.eps: float = config.rms_norm_eps
        self.causal: bool = config.block_causal
        self.self_attn: Any = BlockAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def after_weights(self) -> AfterWeights:
        mlp = self.mlp
        return AfterWeights(
            self.self_attn.o_proj.weight,
            self.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [S, Hkv, D] of x [S, H]: the context, or a block after the layer's norm."""
        attention = self.self_attn
        keys = project(x, attention.k_proj.weight, attention.head_dim)
        keys = rotate(rms_norm(keys, attention.k_norm.weight, self.eps), cos, sin)
        return keys, project(x, attention.v_proj.weight, attention.head_dim)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [N, Hq, D] of blocks x [N, H], after the layer's norm."""
        attention = self.self_attn
        queries = project(x, attention.q_proj.weight, attention.head_dim)
        return rotate(rms_norm(queries, attention.q_norm.weight, self.eps), cos, sin)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftBatchCache) -> Tensor:
        """Serve blocks [N, H] -> [N, H], after the context that is in the cache."""
        x = rms_norm(hidden, self.input_layernorm.weight, self.eps)
        keys, values = self.keys_values(x, cos, sin)
        attention, queries = self.self_attn, self.queries(x, cos, sin)
        attended = cache.attend(
            attention.layer, queries, keys, values, attention.window, sees_ahead=not self.causal
        )
        return after_attention(hidden, attended, self.after_weights(), self.eps)


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
        settings: Any,
        on_guess: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Result],
        anchor: Tensor | None = None,
    ) -> Result:
        """See `Draft.forward`."""
        # The pass that trains (step.py) is written beside this file and not yet called from here.
        raise NotImplementedError

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
