"""One decoder layer of the draft: its parameters, its arithmetic, and the attention it has when it serves.

The arithmetic is functions of explicit weights, so that serving and training share it, and training can repeat a tile of it in
backward with leaves of its own. As built, a layer attends the ordinary way over a key-value cache: that is the served draft.
Training replaces its attention with `LlamaUSPFlashAttention` (see patching.py) and unrolls it (see ttt_step.py).

Legend: S slots, H hidden size, Hq / Hkv heads, D head size, T cached keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eagle3_ds.attention.usp import rotate
from eagle3_ds.model.config import sliding_window


class BeforeWeights(NamedTuple):
    """What precedes the attention. `hidden_norm` is None in layers after the first, which read the hidden state alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    input_norm: Tensor
    hidden_norm: Tensor | None = None


class AfterWeights(NamedTuple):
    """What follows the attention."""

    o: Tensor
    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in fp32 at least, in the dtype of x."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def attention_input(embeds: Tensor, hidden: Tensor, weights: BeforeWeights, eps: float) -> Tensor:
    """embeds, hidden [S, H] -> [S, 2H] for the first layer, [S, H] for later ones."""
    if weights.hidden_norm is None:
        return rms_norm(hidden, weights.input_norm, eps)
    return torch.cat((rms_norm(embeds, weights.input_norm, eps), rms_norm(hidden, weights.hidden_norm, eps)), dim=-1)


def project(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """[S, in] -> [S, heads, D]."""
    return functional.linear(x, weight).unflatten(-1, (-1, head_dim))


def after_attention(hidden: Tensor, attended: Tensor, weights: AfterWeights, eps: float) -> Tensor:
    """hidden [S, H], attended [S, Hq * D] -> the layer's output [S, H]."""
    hidden = hidden + functional.linear(attended, weights.o)
    x = rms_norm(hidden, weights.norm, eps)
    gated = functional.silu(functional.linear(x, weights.gate)) * functional.linear(x, weights.up)
    return hidden + functional.linear(gated, weights.down)


class DraftCache:
    """Keys and values of every layer, [T, Hkv, D] each, appended call by call."""

    def __init__(self, num_layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new slots and return all of them."""
        old = self._layers[layer]
        new = (k, v) if old is None else (torch.cat((old[0], k)), torch.cat((old[1], v)))
        self._layers[layer] = new
        return new

    def __len__(self) -> int:
        first = self._layers[0]
        return 0 if first is None else len(first[0])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` slots."""
        self._layers = [None if kv is None else (kv[0][:length], kv[1][:length]) for kv in self._layers]


class DraftAttention(nn.Module):
    """Causal attention over a cache; holds the projections that training's attention takes over."""

    def __init__(self, config: LlamaConfig, input_size: int, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, sliding_window(config)
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: DraftCache) -> Tensor:
        """Rotated q [S, Hq, D], rotated k and v [S, Hkv, D] of the S newest slots -> [S, Hq * D]."""
        keys, values = cache.append(self.layer, k, v)
        back = torch.arange(len(keys) - len(q), len(keys), device=q.device)[:, None] - torch.arange(len(keys), device=q.device)
        seen = (back >= 0) & (back < (self.window or len(keys)))
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen[None, None],
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).flatten(1)


class DraftLayer(nn.Module):
    """The first layer reads concat(norm(embedding), norm(hidden)); later ones read norm(hidden) alone."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim
        self.eps: float = config.rms_norm_eps
        self.reads_embedding = layer == 0
        self.self_attn: Any = DraftAttention(config, config.hidden_size * (2 if layer == 0 else 1), layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.reads_embedding:
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def before_weights(self) -> BeforeWeights:
        attention = self.self_attn
        projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return BeforeWeights(*projections, self.input_layernorm.weight, self.hidden_norm.weight if self.reads_embedding else None)

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
        """Served: embeds, hidden [S, H] of the S newest slots -> [S, H]; their keys and values are appended to the cache."""
        weights = self.before_weights()
        x = attention_input(embeds, hidden, weights, self.eps)
        q, k, v = (project(x, weight, self.head_dim) for weight in weights[:3])
        attended = self.self_attn.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache)
        return after_attention(hidden, attended, self.after_weights(), self.eps)
