"""What is refused of a target, by name; and what a layer may ask of the attention that is put into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    FalconH1Config,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3NextConfig,
)

from eagle3_ds.algorithms.eagle3 import build_draft_config
from eagle3_ds.attention import PackedAttention
from eagle3_ds.attention.rotary import rotary_frequencies
from eagle3_ds.config import DraftSection
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.targets import (
    SpanForward,
    Target,
    beyond_positions,
    capture_hidden_states,
    check_parallel,
    check_supported,
    packed,
    positions,
)
from tests.unit.tiny_families import (
    AUX_LAYERS,
    FAMILIES,
    SIZES,
    family_config,
    random_model,
    vision_language_config,
)

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_tested_families_pass(family: str) -> None:
    config = family_config(family)
    check_supported(config, "t")
    check_parallel(config, "t", ulysses=2, longest=10**6)


def test_vision_language_configs_pass_by_their_text() -> None:
    config = vision_language_config()
    check_supported(config.get_text_config(), "t")
    check_parallel(config, "t", ulysses=4, longest=10**6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BloomConfig(), "family 'bloom', whose config lacks max_position_embeddings"),
        (family_config("llama", is_encoder_decoder=True), "an encoder-decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_no_draft_can_learn_from(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_supported(config, "t")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (family_config("gemma2", attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
        (Qwen3NextConfig(), "does not go through transformers' attention interface"),
        (Llama4TextConfig(), "layers of the kind chunked_attention"),
        (FalconH1Config(), "does not go through transformers' attention interface"),
        (family_config("gemma3_text", use_bidirectional_attention=True), "bidirectional"),
        (family_config("llama", quantization_config={"quant_method": "fp8"}), "quantized"),
        (
            family_config("llama", rope_parameters=LONG),
            "longrope rotary scaling depend on the length .* from 256 tokens on",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_no_rank_can_run_over_its_spans(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}.*target.capture: single"):
        check_parallel(config, "t", ulysses=2, longest=1000)


def test_length_dependent_angles_pass_below_the_length_they_start_at() -> None:
    check_parallel(family_config("llama", rope_parameters=LONG), "t", ulysses=2, longest=256)


def rotary(**keys: Any) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_theta": 1e4, **keys})


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (rotary(rope_type="default"), 4096),
        (rotary(rope_type="linear", factor=4.0), 16384),
        (rotary(rope_type="dynamic", factor=2.0), 8192),
        (rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096), 16384),
        (rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024), 4096),
        (
            rotary(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=512,
            ),
            4096,
        ),
        (family_config("gemma3_text"), family_config("gemma3_text").max_position_embeddings),
    ],
)
def test_positions_are_those_that_servers_count(config: Any, known: int) -> None:
    assert positions(config) == known
    assert beyond_positions(known, known) is None
    warning = beyond_positions(known + 1, known)
    assert warning is not None and f"data.max_length is {known + 1}" in warning and str(known) in warning


def test_ulysses_must_divide_the_query_heads() -> None:
    with pytest.raises(
        ValueError, match=r"parallel.ulysses is 3, which does not divide the 4 query heads .* Set it to 2"
    ):
        check_parallel(family_config("llama"), "t", ulysses=3, longest=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_draft_that_unrolls_its_rotary_embedding(family: str) -> None:
    config = family_config(family)
    draft = build_draft_config(config, DraftSection(vocab_size=64))
    rope = config.rope_parameters
    assert draft.rope_parameters == rope.get("full_attention", rope)
    frequencies = rotary_frequencies(draft, torch.device("cpu")).frequencies
    assert frequencies.shape == (4,) and frequencies.isfinite().all()


def attention(lengths: tuple[int, ...]) -> PackedAttention:
    return PackedAttention(
        SpanPlan.make(lengths), 0, select_kernel("auto", torch.device("cpu"), torch.float32, 8)
    )


def run(
    forward: SpanForward, ids: torch.Tensor, lengths: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = attention(lengths)
    return forward(ids, torch.from_numpy(packed.plan.position), packed)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"softcap": 50.0}, "asks its attention for softcap"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "a mask of its own"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "without a causal mask"),
        ({"packed": None}, "does not hand the model's keyword arguments on"),
    ],
)
def test_what_a_layer_asks_for_and_no_kernel_does(asked: dict[str, Any], words: str) -> None:
    tensors: dict[str, Any] = {
        "query": torch.zeros(1, 4, 3, 8),
        "key": torch.zeros(1, 2, 3, 8),
        "value": torch.zeros(1, 2, 3, 8),
    }
    known: dict[str, Any] = {
        "attention_mask": None,
        "packed": attention((3,)),
        "position_ids": torch.arange(3),
        "softcap": None,
    }
    packed.packed_attention(nn.Identity(), **{**tensors, **known})
    with pytest.raises(ValueError, match=f"(?s){words}.*target.capture: single"):
        packed.packed_attention(nn.Identity(), **{**tensors, **known, **asked})


def test_a_layer_without_attention_is_noticed() -> None:
    model = random_model(family_config("llama"))

    class NoAttention(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_others: Any) -> tuple[torch.Tensor, None]:
            return hidden_states.roll(1, dims=1), None

    model.model.layers[2].self_attn = NoAttention()
    forward = SpanForward(Target(model, None, model.config, AUX_LAYERS))
    with pytest.raises(ValueError, match="has 4 layers, but 3 went through"):
        run(forward, torch.arange(5), (5,))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_mlps_see_a_few_rows_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(random_model(family_config(family)), None, family_config(family), AUX_LAYERS)
    ids, lengths = torch.arange(40) % SIZES["vocab_size"], (23, 17)
    expected = [
        torch.cat(parts)
        for parts in zip(*(capture_hidden_states(target, x) for x in ids.split(lengths)), strict=True)
    ]
    monkeypatch.setattr(packed, "MLP_ROWS", 9)
    seen = []
    plain = type(target.base.layers[0].mlp).forward

    def counted(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[1])
        return plain(self, hidden)

    monkeypatch.setattr(type(target.base.layers[0].mlp), "forward", counted)
    for found, wanted in zip(run(SpanForward(target), ids, lengths), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert seen == [9, 9, 9, 9, 4] * SIZES["num_hidden_layers"]
