"""Texts that a target reads together: one forward for all of them, exact for each.

Prompts are read one by one, in pieces. Their keys and values are then laid side by side, padded on the left,
so that the newest token of every text stands in the last column. After a round in which texts keep unequal
numbers of tokens, their keys and values are moved to the right again. So the distance of two columns of a
text is the distance of its two tokens, which sliding windows measure, and an ordinary attention mask hides
what lies left of a text.

Legend: B texts, S tokens of a forward, T columns, V vocabulary of the target, A = layers * hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from eagle3_ds.eval.choice import GREEDY, Greedy
from eagle3_ds.eval.speculative import CUT_TOLERANCE, TargetStream, cache_can_be_cut, cache_name
from eagle3_ds.targets import AuxCapture, Target

logger = logging.getLogger(__name__)
PIECE = 2048
"""Tokens of a prompt that are read at once: an attention mask has a row for each."""
BATCH_TOKENS, BATCH_TEXTS = 16384, 64
"""The most tokens, padding included, and the most texts of a batch. A longer text is a batch of its own."""
PROBE_LENGTHS, PROBE_READ, PROBE_KEPT = (24, 17, 9), 4, (1, 4, 2)
"""The texts by which a batch is tried, the tokens that are read after them, and those that are kept."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of RoPE whose angles depend on the longest text of a forward."""
_BATCHES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

KeysValues = list[tuple[Tensor, Tensor]]
"""Of one text: for each layer keys and values, [Hkv, its tokens, D]."""


@dataclass
class Prompt:
    """A prompt that the target has read.

    Attributes:
        tokens: its ids.
        first: the token that the target gives after it.
        aux: [its tokens, A], what the target hands to the draft.
        cache: its keys and values; empty while a `TargetBatch` has them.
    """

    tokens: list[int]
    first: int
    aux: Tensor
    cache: KeysValues


@torch.no_grad()
def read_prompt(target: Target, tokens: Sequence[int], choice: Greedy = GREEDY, text: int = 0) -> Prompt:
    """Read a prompt in pieces of `PIECE` tokens. `choice` gives the token after it; it is its text `text`."""
    stream, aux = TargetStream(target, rereads=False), list[Tensor]()
    for start in range(0, len(tokens), PIECE):
        logits, states = stream.read(tokens[start : start + PIECE], last_only=True)
        aux.append(states)
    cache: KeysValues = [(keys[0], values[0]) for keys, values in stream.layers()]
    ((first,),) = choice.tokens(logits[None], [text], [0])
    return Prompt(list(tokens), first, torch.cat(aux), cache)


class TargetBatch:
    """The target in the middle of several texts. It takes the keys and values of the prompts over.

    Args:
        target: one for which `texts_can_be_batched`, or any with a cache that can be cut and one prompt.
        prompts: what was read of each text.
    """

    def __init__(self, target: Target, prompts: Sequence[Prompt]) -> None:
        self._target, self._name = target, cache_name(target.base)
        self._lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        self._cache = DynamicCache()
        most = int(self._lengths.max())
        for layer in range(len(prompts[0].cache)):
            pair: list[Tensor] = []
            for part in (0, 1):
                texts = [prompt.cache[layer][part] for prompt in prompts]
                pair.append(torch.stack([functional.pad(t, (0, 0, most - t.shape[1], 0)) for t in texts]))
            self._cache.update(pair[0], pair[1], layer)
            for prompt in prompts:
                # The copy is made layer by layer, so that the keys and values exist about once.
                prompt.cache[layer] = (torch.empty(0), torch.empty(0))
        for prompt in prompts:
            prompt.cache = []
        self._columns = most

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feed S tokens to every text: int64 [B, S] -> logits [B, S, V] and g [B, S, A]."""
        tokens = tokens.to(self._target.device)
        num_new = tokens.shape[1]
        self._lengths = self._lengths + num_new
        self._columns += num_new
        column = torch.arange(self._columns)
        shown = column >= (self._columns - self._lengths)[:, None]
        positions = self._lengths[:, None] - num_new + torch.arange(num_new)
        arguments: dict[str, Any] = {self._name: self._cache}
        if not bool(shown.all()):
            arguments["attention_mask"] = shown.to(tokens.device, torch.int64)
        base = self._target.base
        with AuxCapture(base, self._target.aux_layers) as capture:
            output = base(
                input_ids=tokens, position_ids=positions.to(tokens.device), use_cache=True, **arguments
            )
            aux = capture.take_batch()
        return functional.linear(output.last_hidden_state, self._target.head), aux

    def keep(self, dropped: Sequence[int]) -> None:
        """Forget the last `dropped[b]` tokens of text b."""
        drop = torch.tensor(list(dropped))
        self._lengths = self._lengths - drop
        most = int(self._lengths.max())
        # New column c of `most` columns holds what stood `drop` columns left of it, counted from the end.
        source = torch.arange(self._columns - most, self._columns) - drop[:, None]
        index = source.clamp(min=0).to(self._target.device)[:, None, :, None]
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                setattr(layer, name, old.gather(2, index.expand(-1, old.shape[1], -1, old.shape[3])))
        self._columns = most

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts alone, numbered anew in this order."""
        index = torch.tensor(list(texts))
        self._lengths = self._lengths[index]
        self._cache.batch_select_indices(index.to(self._target.device))
        self.keep([0] * len(texts))

    def keys_values(self, text: int, length: int) -> KeysValues:
        """A copy of the keys and values of the first `length` tokens of a text."""
        start = self._columns - int(self._lengths[text])
        span = slice(start, start + length)
        return [
            (layer.keys[text, :, span].clone(), layer.values[text, :, span].clone())
            for layer in self._cache.layers
        ]


def batches(target: Target, lengths: Sequence[int], new_tokens: int) -> list[list[int]]:
    """Which prompts are decoded together: texts of like lengths, within `BATCH_TOKENS` and `BATCH_TEXTS`.

    Args:
        lengths: of the prompts.
        new_tokens: the most that follow a prompt.

    Returns:
        Indices into `lengths`, each in one batch, the longest batch first: memory that is too small shows at
        once.
    """
    most = BATCH_TEXTS if texts_can_be_batched(target) else 1
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first of a batch is its longest.
        if found and len(found[-1]) < most:
            columns = lengths[found[-1][0]] + new_tokens
            if columns * (len(found[-1]) + 1) <= BATCH_TOKENS:
                found[-1].append(index)
                continue
        found.append([index])
    return found


def texts_can_be_batched(target: Target) -> bool:
    """Whether texts that the target reads together come out as those it reads alone: tried once per target,
    with rounds in which they keep unequal numbers of tokens.
    """
    if target.model not in _BATCHES:
        rope = getattr(target.config, "rope_parameters", None) or {}
        kinds = {rope.get("rope_type")} | {
            part.get("rope_type") for part in rope.values() if isinstance(part, dict)
        }
        can = cache_can_be_cut(target) and not kinds & set(LENGTH_DEPENDENT) and _batch_is_exact(target)
        _BATCHES[target.model] = can
        if not can:
            logger.info("evaluation: texts of this target are decoded one at a time")
    return _BATCHES[target.model]


@torch.no_grad()
def _batch_is_exact(target: Target) -> bool:
    generator = torch.Generator().manual_seed(1)
    size = (len(PROBE_LENGTHS), max(PROBE_LENGTHS) + 2 * PROBE_READ)
    text = torch.randint(target.config.vocab_size, size, generator=generator)
    prompts = [text[row, :length].tolist() for row, length in enumerate(PROBE_LENGTHS)]
    first, second = text[:, -2 * PROBE_READ : -PROBE_READ], text[:, -PROBE_READ:]
    try:
        batch = TargetBatch(target, [read_prompt(target, prompt) for prompt in prompts])
        batch.read(first)
        batch.keep([PROBE_READ - kept for kept in PROBE_KEPT])
        found, _ = batch.read(second)
    except Exception as error:  # a family's own code, which may fail in any way where it wants no batch
        logger.debug("a batch of texts: %s: %s", type(error).__name__, error)
        return False
    for row, prompt in enumerate(prompts):
        whole = [*prompt, *first[row, : PROBE_KEPT[row]].tolist(), *second[row].tolist()]
        expected = TargetStream(target, rereads=True).read(whole)[0][-PROBE_READ:].float()
        difference = (found[row].float() - expected).norm() / expected.norm()
        if not float(difference) <= CUT_TOLERANCE[target.head.dtype]:
            return False
    return True
