"""One decoder layer of the draft: its parameters, its arithmetic, and the attention it has when it serves.

The arithmetic is functions of explicit weights, so that serving and training share it, and training can
repeat a tile of it in backward with leaves of its own. As built, a layer attends the ordinary way over a
key-value cache: that is the served draft. Training replaces its attention with `LlamaUSPFlashAttention` (see
patching.py) and unrolls it (see ttt_step.py).

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
from eagle3_ds.draft.served import DraftAttention, DraftCache


class BeforeWeights(NamedTuple):
    """What precedes the attention. `hidden_norm` is None in layers after the first, which read the hidden
    state alone.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    input_norm: Tensor
    hidden_norm: Tensor | None = None


def attention_input(embeds: Tensor, hidden: Tensor, weights: BeforeWeights, eps: float) -> Tensor:
    """embeds, hidden [S, H] -> [S, 2H] for the first layer, [S, H] for later ones."""
    if weights.hidden_norm is None:
        return rms_norm(hidden, weights.input_norm, eps)
    return torch.cat(
        (rms_norm(embeds, weights.input_norm, eps), rms_norm(hidden, weights.hidden_norm, eps)), dim=-1
    )


class DraftLayer(nn.Module):
    """The first layer reads concat(norm(embedding), norm(hidden)); later ones read norm(hidden) alone."""

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

    def forward(self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache) -> Tensor:
        """Served: embeds, hidden [S, H] of the S newest slots -> [S, H]; their keys and values are appended
        to the cache.
        """
        weights = self.before_weights()
        x = attention_input(embeds, hidden, weights, self.eps)
        q, k, v = (project(x, weight, self.head_dim) for weight in weights[:3])
        attended = self.self_attn.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache)
        return after_attention(self.residual(hidden), attended, self.after_weights(), self.eps)

    def residual(self, hidden: Tensor) -> Tensor:
        """What the attention's output is added to, [S, H]."""
        return rms_norm(hidden, self.hidden_norm.weight, self.eps) if self.normed_residual else hidden
