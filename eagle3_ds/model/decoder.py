"""One decoder layer of the draft, and the attention it has when it serves.

As built, a layer attends the ordinary way over a key-value cache: that is the served draft. Training replaces its attention
with `LlamaUSPFlashAttention` (see patching.py), which attends over the TTT unroll instead.

Legend: S slots, H hidden size, Hq / Hkv heads, D head size, T cached keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eagle3_ds.attention import UnrollMemory
from eagle3_ds.attention.usp import rotate


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
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache) -> Tensor:
        """x [S, 2H] or [S, H] of the S newest slots -> [S, H]; their keys and values are appended to the cache."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        keys, values = cache.append(self.layer, rotate(k, cos, sin), v)
        seen = torch.arange(len(keys), device=x.device) <= torch.arange(len(keys) - len(x), len(keys), device=x.device)[:, None]
        out = functional.scaled_dot_product_attention(
            rotate(q, cos, sin).transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen[None, None],
            enable_gqa=True,
        )
        return self.o_proj(out[0].transpose(0, 1).flatten(1))


class DraftLayer(nn.Module):
    """The first layer reads concat(norm(embedding), norm(hidden)); later ones read norm(hidden) alone."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.reads_embedding = layer == 0
        self.self_attn: nn.Module = DraftAttention(config, config.hidden_size * (2 if layer == 0 else 1), layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.reads_embedding:
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache) -> Tensor:
        """Served: embeds, hidden [S, H] -> hidden [S, H]."""
        attended = self.self_attn(self._attention_input(embeds, hidden), cos, sin, cache)
        return self._feed_forward(hidden + attended)

    def unroll_step(
        self,
        embed: Callable[[], Tensor],
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        memory: UnrollMemory,
        recompute: bool,
    ) -> Tensor:
        """Trained: one TTT step with the USP attention in place. `embed` looks the step's tokens up, [S, H].

        With `recompute`, what precedes and what follows the attention is computed again in backward, the attention never.
        Non-reentrant, because the reentrant form breaks on ZeRO 2 and 3.
        """
        attention: Any = self.self_attn

        def before(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return attention.project(self._attention_input(embed(), hidden), cos, sin)

        def after(hidden: Tensor, attended: Tensor) -> Tensor:
            return self._feed_forward(hidden + attention.o_proj(attended))

        q, k, v = _maybe_recompute(recompute, before, hidden)
        return _maybe_recompute(recompute, after, hidden, attention.attend(q, k, v, memory))

    def _attention_input(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        if not self.reads_embedding:
            return self.input_layernorm(hidden)
        return torch.cat((self.input_layernorm(embeds), self.hidden_norm(hidden)), dim=-1)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _maybe_recompute(recompute: bool, function: Callable[..., Any], *inputs: Tensor) -> Any:
    if not recompute or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
