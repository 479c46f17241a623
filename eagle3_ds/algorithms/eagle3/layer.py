"""One decoder layer of the draft: its parameters, its arithmetic, and the attention of the served draft.

The arithmetic is functions that take their weights as arguments, so that serving and training share it and
training can repeat it for one tile of slots in backward. A new layer attends over a key-value cache, as a
served draft does. For training its attention is replaced with `LlamaUSPFlashAttention`
(attention/patching.py), and step.py unrolls it.

Legend: S slots, H hidden size, Hq / Hkv heads, D head size, T cached keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eagle3_ds.algorithms.eagle3.variants import flag
from eagle3_ds.attention.rotary import rotate
from eagle3_ds.draft.decoder import AfterWeights, after_attention, project, rms_norm
from eagle3_ds.draft.served import DraftAttention, DraftBatchCache, DraftCache


class BeforeWeights(NamedTuple):
    """The weights of what precedes the attention; `in` is 2H for the first layer, H for later ones.

    Attributes:
        q: [Hq * D, in]; k, v: [Hkv * D, in], the projections.
        input_norm: [H], of the embedding in the first layer, of the hidden state in later ones.
        hidden_norm: [H], of the hidden state in the first layer; None in later ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    input_norm: Tensor
    hidden_norm: Tensor | None = None


def attention_input(embeds: Tensor, hidden: Tensor, weights: BeforeWeights, eps: float) -> Tensor:
    """What q, k and v are projected from: embeds, hidden [S, H] -> concat(norm(embeds), norm(hidden)) [S, 2H]
    in the first layer, norm(hidden) [S, H] in later ones.
    """
    if weights.hidden_norm is None:
        return rms_norm(hidden, weights.input_norm, eps)
    return torch.cat(
        (rms_norm(embeds, weights.input_norm, eps), rms_norm(hidden, weights.hidden_norm, eps)), dim=-1
    )


class DraftLayer(nn.Module):
    """A Llama decoder layer, except that the first one reads concat(norm(embedding), norm(hidden)).

    Attributes:
        reads_embedding: true in the first layer.
        normed_residual: the first layer of the variant `norm_before_residual`, whose residual is
            norm(hidden).
        self_attn: `DraftAttention`, or `LlamaUSPFlashAttention` after `patch_attention`.
        head_dim, eps: from the config.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim
        self.eps: float = config.rms_norm_eps
        self.reads_embedding = layer == 0
        self.normed_residual = layer == 0 and flag(config, "norm_before_residual")
        self.self_attn: Any = DraftAttention(config, config.hidden_size * (2 if layer == 0 else 1), layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.reads_embedding:
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def before_weights(self) -> BeforeWeights:
        attention = self.self_attn
        projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return BeforeWeights(
            *projections,
            self.input_layernorm.weight,
            self.hidden_norm.weight if self.reads_embedding else None,
        )

    def after_weights(self) -> AfterWeights:
        mlp = self.mlp
        return AfterWeights(
            self.self_attn.o_proj.weight,
            self.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )

    def forward(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache | DraftBatchCache
    ) -> Tensor:
        """Serve the S newest slots: embeds, hidden [S, H], cos, sin [S, D] -> [S, H]. Their keys and values
        are appended to the cache.
        """
        weights = self.before_weights()
        x = attention_input(embeds, hidden, weights, self.eps)
        q, k, v = (project(x, weight, self.head_dim) for weight in weights[:3])
        attended = self.self_attn.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache)
        return after_attention(self.residual(hidden), attended, self.after_weights(), self.eps)

    def residual(self, hidden: Tensor) -> Tensor:
        """What the attention's output is added to: hidden [S, H] -> [S, H]."""
        return rms_norm(hidden, self.hidden_norm.weight, self.eps) if self.normed_residual else hidden
