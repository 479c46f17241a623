"""The attention of a served draft: causal, over a cache of keys and values. For training it is replaced
(attention/patching.py).

Legend: S new slots, T cached keys, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig

from eagle3_ds.draft.geometry import sliding_window


class DraftCache:
    """Keys and values of every layer, [T, Hkv, D] each. `len` gives T."""

    def __init__(self, num_layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [S, Hkv, D] to a layer and return all of its keys and values, [T + S, Hkv, D]."""
        old = self._layers[layer]
        new = (k, v) if old is None else (torch.cat((old[0], k)), torch.cat((old[1], v)))
        self._layers[layer] = new
        return new

    def __len__(self) -> int:
        first = self._layers[0]
        return 0 if first is None else len(first[0])

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` slots of every layer."""
        self._layers = [None if kv is None else (kv[0][:length], kv[1][:length]) for kv in self._layers]


class DraftAttention(nn.Module):
    """Causal attention over a cache. It owns the projections that `LlamaUSPFlashAttention` takes over.

    Args:
        config: of the draft.
        input_size: entries of what q, k and v are projected from.
        layer: index of the layer in the cache.
    """

    def __init__(self, config: LlamaConfig, input_size: int, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, sliding_window(config)
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: DraftCache) -> Tensor:
        """Append k and v to the cache and attend: rotated q [S, Hq, D], rotated k and v [S, Hkv, D] of the S
        newest slots -> [S, Hq * D].
        """
        keys, values = cache.append(self.layer, k, v)
        back = torch.arange(len(keys) - len(q), len(keys), device=q.device)[:, None] - torch.arange(
            len(keys), device=q.device
        )
        seen = (back >= 0) & (back < (self.window or len(keys)))
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen[None, None],
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).flatten(1)
