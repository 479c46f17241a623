"""One decoder layer of a DFlash draft: its weights, and its arithmetic as a server runs it.

Legend: S slots, N inputs of several blocks, H hidden size, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eagle3_ds.attention.rotary import rotate
from eagle3_ds.draft.decoder import AfterWeights, after_attention, project, rms_norm
from eagle3_ds.draft.served import DraftAttention, DraftBatchCache


def normed_heads(
    x: Tensor, weight: Tensor, norm: Tensor, angles: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """Queries or keys of x [S, H]: projected by weight [heads * D, H], each head normed by norm [D], rotated
    by angles [S, R] -> [S, heads, D].
    """
    return rotate(rms_norm(project(x, weight, len(norm)), norm, eps), *angles)


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
        keys = normed_heads(x, attention.k_proj.weight, attention.k_norm.weight, (cos, sin), self.eps)
        return keys, project(x, attention.v_proj.weight, attention.head_dim)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [N, Hq, D] of blocks x [N, H], after the layer's norm."""
        attention = self.self_attn
        return normed_heads(x, attention.q_proj.weight, attention.q_norm.weight, (cos, sin), self.eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftBatchCache) -> Tensor:
        """Serve blocks [N, H] -> [N, H], after the context that is in the cache."""
        x = rms_norm(hidden, self.input_layernorm.weight, self.eps)
        keys, values = self.keys_values(x, cos, sin)
        attention, queries = self.self_attn, self.queries(x, cos, sin)
        attended = cache.attend(
            attention.layer, queries, keys, values, attention.window, sees_ahead=not self.causal
        )
        return after_attention(hidden, attended, self.after_weights(), self.eps)
