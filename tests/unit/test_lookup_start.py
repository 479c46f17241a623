"""A draft that begins with a look-up names what followed in its context before it has learnt anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.algorithms.eagle3.lookup import slow_channels
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import DraftCache, ReadText

V, VD, H, FRESH, COPIED = 160, 128, 128, 192, 64
OFFSET = 3.0
"""What all states have in common: no score may depend on it."""


def make_config(num_kv_heads: int = 2, theta: float = 1e6, **keys: Any) -> LlamaConfig:
    target = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return build_draft_config(target, DraftSection(vocab_size=VD, **keys))


class Texts:
    """Random tokens, of which a span comes again; and states that hold the last two of them."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.embedding, self.head = torch.randn(V, H, generator=rng), torch.randn(V, H, generator=rng)
        before = torch.randn(H, H, generator=rng) / H**0.5
        self.vocabulary = torch.randperm(V, generator=rng)[:VD].sort().values
        rng.manual_seed(seed)
        fresh = self.vocabulary[torch.randint(0, VD, (FRESH,), generator=rng)]
        start = int(torch.randint(0, FRESH - COPIED, (1,), generator=rng))
        self.tokens = torch.cat((fresh, fresh[start : start + COPIED]))
        read = self.embedding[self.tokens]
        low = read + 0.7 * torch.cat((torch.zeros(1, H), read[:-1])) @ before
        low += OFFSET + 0.2 * torch.randn(low.shape, generator=rng)
        self.aux = torch.cat((low, torch.randn(len(low), 2 * H, generator=rng)), dim=1)

    def read(self) -> ReadText:
        follows = torch.ones(len(self.tokens), dtype=torch.bool)
        follows[-1] = False
        tokens = torch.cat((self.tokens[1:], self.tokens[:1]))
        return ReadText(self.aux, tokens, follows, self.vocabulary)


def wired(config: LlamaConfig, seeds: range = range(12)) -> DraftModel:
    torch.manual_seed(0)
    texts = [Texts(seed) for seed in seeds]
    read = [text.read() for text in texts]
    draft = DraftModel(config)
    whole = ReadText(
        torch.cat([each.aux for each in read]),
        torch.cat([each.tokens for each in read]),
        torch.cat([each.follows for each in read]),
        texts[0].vocabulary,
    )
    draft.look_up_from_start(whole, texts[0].embedding, texts[0].head[texts[0].vocabulary])
    return draft


def share_found(draft: DraftModel, text: Texts) -> float:
    """Of the copied tokens but the first three, how many the draft guesses."""
    count = len(text.tokens) - 1
    hidden = draft.project_aux(text.aux[:count])
    embeds = text.embedding[text.tokens[1:]]
    cache = DraftCache(draft.config.num_hidden_layers)
    guesses = draft.logits(draft.decode(embeds, hidden, torch.arange(count), cache)).argmax(1)
    # Slot i guesses token i + 2.
    found: Tensor = text.vocabulary[guesses[FRESH : count - 1]] == text.tokens[FRESH + 2 :]
    return float(found[1:].float().mean())


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config(num_kv_heads=4),
        make_config(num_kv_heads=1),
        make_config(rope={"theta": 1e4, "partial_factor": 0.5}),
        make_config(aux_norm=True, norm_output=True),
        make_config(norm_before_fc=True, norm_before_residual=True),
        make_config(num_layers=2),
    ],
    ids=["plain", "4 key heads", "1 key head", "half rotated", "eagle3.1", "norms before", "2 layers"],
)
@torch.no_grad()
def test_it_finds_what_followed(config: LlamaConfig) -> None:
    draft = wired(config)
    shares = [share_found(draft, Texts(seed)) for seed in range(100, 105)]
    assert sum(shares) / len(shares) > 0.45, shares
    torch.manual_seed(0)
    assert share_found(DraftModel(config), Texts(100)) < 0.05


@torch.no_grad()
def test_text_of_single_tokens_or_none_leaves_weights_finite() -> None:
    text = Texts(0).read()
    for count, follows in ((1, False), (8, False), (3, True)):
        draft = DraftModel(make_config())
        behind = torch.arange(count) < (count - 1 if follows else 0)
        part = ReadText(text.aux[:count], text.tokens[:count], behind, text.vocabulary)
        draft.look_up_from_start(part, Texts(0).embedding, Texts(0).head[text.vocabulary])
        assert all(bool(parameter.isfinite().all()) for parameter in draft.parameters())


def test_slow_channels_hardly_turn_in_the_longest_context() -> None:
    config = make_config()
    # 1e6 ** (-i / 16) * 1024 is less than 1 from i = 9 on.
    assert slow_channels(config).tolist() == [*range(9, 16), *range(25, 32)]
    half = make_config(rope={"theta": 1e6, "partial_factor": 0.5})
    assert slow_channels(half).tolist() == [5, 6, 7, 13, 14, 15, *range(16, 32)]
    # A theta that turns all of them gives an eighth, the slowest.
    assert slow_channels(make_config(theta=10.0)).tolist() == [14, 15, 30, 31]


def test_what_cannot_begin_so_is_refused() -> None:
    with pytest.raises(ValueError, match="no such thing. Remove it, or set algorithm to eagle3"):
        DraftSection(vocab_size=VD, algorithm="peagle", start="lookup")
    with pytest.raises(ValueError, match="Set hidden_size to null"):
        DraftSection(vocab_size=VD, hidden_size=32, start="lookup")
