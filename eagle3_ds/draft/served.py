"""The attention of a served draft: causal, over a cache of keys and values. For training it is replaced
(attention/patching.py).

Legend: S new slots, T cached keys, R texts of a batch, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig

from eagle3_ds.draft.contract import Guesser
from eagle3_ds.draft.geometry import sliding_window

GROWTH = 256
"""Slots that a full `DraftBatchCache` is enlarged by."""


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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """As `DraftAttention.attend`, with the keys and values of one text."""
        keys, values = self.append(layer, k, v)
        back = torch.arange(len(keys) - len(q), len(keys), device=q.device)[:, None] - torch.arange(
            len(keys), device=q.device
        )
        seen = (back >= 0) & (back < (window or len(keys)))
        return _attention(q[None], keys[None], values[None], seen[None])[0]


class DraftBatchCache:
    """Keys and values of several texts, of any lengths, in every layer.

    The new slots of a call lie one text after the other, so that all of a draft but its attention works on
    [S, H] as it does for one text. `open` says whose they are.

    Args:
        num_layers: of the draft.
        num_texts: texts are numbered from 0.

    Attributes:
        lengths: cached slots of each text.
    """

    def __init__(self, num_layers: int, num_texts: int) -> None:
        self.lengths = [0] * num_texts
        # A layer's keys and values, [texts, capacity, Hkv, D]. What lies beyond a text's length is masked.
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._texts, self._counts = list[int](), list[int]()

    def open(self, texts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
        """The next slots are `counts[i]` of text `texts[i]`, one text after the other. Returns their places
        in their texts, int64 [S]; they are in the cache when every layer has attended.
        """
        self._texts, self._counts = list(texts), list(counts)
        starts = [self.lengths[text] for text in texts]
        for text, count in zip(texts, counts, strict=True):
            self.lengths[text] += count
        places = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return torch.cat(places).to(device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v [S, Hkv, D] of the open slots into a layer, and return its keys and values, [texts,
        capacity, Hkv, D].
        """
        texts, _, row, _, place = self._open_slots(k.device)
        keys, values = self._stored(layer, k, max(self.lengths[text] for text in self._texts))
        keys[texts[row], place], values[texts[row], place] = k, v
        return keys, values

    def _open_slots(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The texts of the open slots and where they end, [R]; and of each slot, [S], its row among them, its
        number among those of its text, and its place.
        """
        texts = torch.tensor(self._texts, device=device)
        counts = torch.tensor(self._counts, device=device)
        ends = torch.tensor([self.lengths[text] for text in self._texts], device=device)
        row = torch.repeat_interleave(torch.arange(len(texts), device=device), counts)
        column = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
        return texts, ends, row, column, (ends - counts)[row] + column

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        sees_ahead: bool = False,
    ) -> Tensor:
        """As `DraftAttention.attend`; each slot sees the slots of its own text, with `sees_ahead` also those
        after it.
        """
        device, most = q.device, max(self._counts)
        keys, values = self.write(layer, k, v)
        texts, ends, row, column, place = self._open_slots(device)
        length = int(ends.max())
        padded = q.new_zeros(len(texts), most, *q.shape[1:])
        padded[row, column] = q
        # A place without a slot is given the place 0, so that its softmax is not over nothing.
        places = torch.zeros(len(texts), most, dtype=torch.int64, device=device)
        places[row, column] = place
        at = torch.arange(length, device=device)
        back = places[:, :, None] - at
        seen = (at < ends[:, None, None]) if sees_ahead else (back >= 0)
        seen = seen & (back < (window or length))
        return _attention(padded, keys[texts, :length], values[texts, :length], seen)[row, column]

    def _stored(self, layer: int, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, enlarged to hold `length` slots of each text."""
        old = self._layers[layer]
        if old is None or old[0].shape[1] < length:
            shape = (len(self.lengths), length + GROWTH, *like.shape[1:])
            new = (like.new_zeros(shape), like.new_zeros(shape))
            if old is not None:
                for larger, smaller in zip(new, old, strict=True):
                    larger[:, : smaller.shape[1]] = smaller
            self._layers[layer] = old = new
        return old


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [R, S, Hq, D], k, v [R, T, Hkv, D], seen bool [R, S, T] -> [R, S, Hq * D]."""
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None], enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)


class OneByOne:
    """Guessers of single texts as the guesser of a batch (`draft.contract.BatchGuesser`).

    Args:
        start: makes the guesser of the text of a number, at the start of that text.
    """

    def __init__(self, start: Callable[[int], Guesser]) -> None:
        self._start = start
        self._guessers: dict[int, Guesser] = {}

    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        """As `BatchGuesser.propose`."""
        for text in tokens:
            if text not in self._guessers:
                self._guessers[text] = self._start(text)
        return {text: self._guessers[text].propose(aux[text], new, count) for text, new in tokens.items()}


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: DraftCache | DraftBatchCache) -> Tensor:
        """Append k and v to the cache and attend: rotated q [S, Hq, D], rotated k and v [S, Hkv, D] of the S
        newest slots -> [S, Hq * D].
        """
        return cache.attend(self.layer, q, k, v, self.window)
