"""Module names, logits, latent attention and quantization of a target: judged from what its model does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3_ds.algorithms.eagle3 import build_draft_config
from eagle3_ds.config import DraftSection, TargetSection
from eagle3_ds.targets import (
    Target,
    capture_hidden_states,
    check_config_structure,
    check_quantization,
    check_spans,
    check_weight_names,
    fold_factor,
    load_embedding_and_head,
    load_full_config,
    load_model,
    load_target,
    logits_factor,
)
from eagle3_ds.targets.structure import check_logits, product_problem
from tests.unit.tiny_families import (
    AUX_LAYERS,
    FAMILIES,
    LATENT,
    SIZES,
    family_config,
    other_config,
    random_model,
    vision_language_config,
)
from tests.unit.tiny_target import build_tiny_target


def tiny(name: str, **changes: Any) -> Any:
    return getattr(transformers, name)(**{**SIZES, **changes})


# Kinds of logits: a factor on the head, on the hidden state before it, a division.
FACTORS = {
    "falcon_h1": (other_config("falcon_h1"), 0.25),
    "granite": (tiny("GraniteConfig", logits_scaling=8.0), 0.125),
    "granitemoe": (tiny("GraniteMoeConfig", logits_scaling=6.0), 1 / 6),
    "cohere": (tiny("CohereConfig", logit_scale=0.0625), 0.0625),
    "cohere2": (tiny("Cohere2Config", logit_scale=4.0), 4.0),
    "minicpm3": (tiny("MiniCPM3Config", dim_model_base=16, num_key_value_heads=4), 0.5),
    "hyperclovax": (tiny("HyperCLOVAXConfig", logits_scaling=8.0), 8.0),
    "llama": (tiny("LlamaConfig"), 1.0),
}
# No constant positive number: a cap, and a factor that turns the distribution round.
REFUSED = {
    "gemma2": (family_config("gemma2", final_logit_softcapping=30.0), "no constant factor.* = 30.0"),
    "granite": (tiny("GraniteConfig", logits_scaling=-8.0), "-0.125 times head x hidden state"),
}


@pytest.mark.parametrize("family", FACTORS)
def test_a_constant_factor_of_the_logits_is_measured_from_the_config(family: str) -> None:
    config, factor = FACTORS[family]
    check_config_structure(config, "t")
    assert logits_factor(config, "t") == float(torch.tensor(factor))


@pytest.mark.parametrize("family", FACTORS)
def test_head_times_hidden_state_is_what_the_model_says(family: str, tmp_path: Path) -> None:
    """By the head of a loaded target and by the one that is read alone; the embedding has no factor."""
    config, factor = FACTORS[family]
    random_model(config).save_pretrained(tmp_path)
    model, found = load_model(tmp_path, "t", "float32")
    target = Target(model, None, config, AUX_LAYERS, found)
    embedding, head = load_embedding_and_head(tmp_path)
    _, teacher = capture_hidden_states(target, torch.arange(9))
    expected = model(input_ids=torch.arange(9)[None], use_cache=False).logits[0]
    assert torch.equal(head, target.head) and torch.equal(embedding, target.embedding)
    torch.testing.assert_close(teacher @ head.T, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (factor == 1.0) == torch.equal(head, model.get_output_embeddings().weight)


@pytest.mark.parametrize("factor", [0.0625, 8.0, 1 / 6])
def test_a_factor_is_folded_without_loss_where_it_can_be(factor: float) -> None:
    head = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = (fold_factor(head, factor).double() - head.double() * factor).abs() / (
        head.double() * factor
    ).abs()
    assert float(error.max()) == 0 if factor != 1 / 6 else 0 < float(error.max()) <= 2**-8
    assert fold_factor(head, 1.0) is head


@pytest.mark.parametrize("family", REFUSED)
def test_logits_that_are_no_constant_times_the_product_are_refused_from_the_config(family: str) -> None:
    config, words = REFUSED[family]
    for judge in (check_config_structure, logits_factor):
        with pytest.raises(
            ValueError, match=f"(?s)family '{family}', whose logits are .*{words}.*choose a target"
        ):
            judge(config, "t")


@pytest.mark.parametrize("family", [*(f for f in FACTORS if f != "llama"), "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_more_than_a_product_are_refused_at_load(family: str, dtype: torch.dtype) -> None:
    """Where the factor is not known: soft caps too, which small logits of a random model do not come near."""
    config = REFUSED["gemma2"][0] if family == "gemma2" else FACTORS[family][0]
    model = random_model(config).to(dtype)
    with pytest.raises(ValueError, match=f"family '{family}', whose logits are"):
        check_logits(model, config, "t")
    if family != "gemma2":
        check_logits(model, config, "t", FACTORS[family][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_tested_families_pass(family: str, dtype: torch.dtype) -> None:
    config = family_config(family)
    check_config_structure(config, "t")
    check_spans(config, "t")
    check_logits(random_model(config).to(dtype), config, "t")


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "jamba", "deepseek_v3", "deepseek_v32"])
def test_families_that_are_captured_singly_pass(family: str) -> None:
    check_config_structure(other_config(family), "t")


def test_vision_language_targets_pass_by_their_text() -> None:
    check_config_structure(vision_language_config(), "t")
    check_spans(vision_language_config(), "t")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.full((2, 3), 2.0), "2 times head x hidden state"),
        (torch.ones(2, 4), r"\(2, 4\) where head x hidden state is \(2, 3\)"),
        (torch.eye(3)[:2], "no constant factor"),
        (torch.ones(2, 3) + 1e-5, None),
    ],
)
def test_what_is_said_of_a_difference(found: torch.Tensor, words: str | None) -> None:
    problem = product_problem(found, torch.ones(2, 3), 1e-3)
    assert problem is None if words is None else re.search(words, problem or "")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny("HrmTextConfig"), "looked for its .* layers as `layers` of HrmTextModel.* L_module, H_module"),
        (tiny("GPT2Config", n_embd=32, n_head=4), "layers as `layers` of GPT2Model. GPT2Model has wte"),
        (
            tiny("BloomConfig", n_layer=4, n_head=4),
            "layers as `layers` of BloomModel.* has word_embeddings",
        ),
        (tiny("HYV4Config"), r"layers pass on \(1, 12, 4, 32\) where .* one hidden state per token"),
        (tiny("PhiConfig"), "a bias in its head"),
        (tiny("LlamaConfig", hidden_act="nothing"), "transformers cannot build it from its config.json"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_modules_that_are_elsewhere_are_named(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        check_config_structure(config, "t")


def test_llama4_is_captured_by_its_layers() -> None:
    """Its `get_decoder` gives the whole model."""
    config = tiny("Llama4TextConfig", num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=64)
    check_config_structure(config, "t")
    target = Target(random_model(config), None, config, AUX_LAYERS)
    aux, teacher = capture_hidden_states(target, torch.arange(9))
    assert aux.shape == (9, 96)
    expected = target.model(input_ids=torch.arange(9)[None], use_cache=False).logits[0]
    torch.testing.assert_close(teacher @ target.head.T, expected)


@pytest.mark.parametrize(
    "config",
    [
        other_config("deepseek_v3"),
        tiny("MiniCPM3Config", **{key: LATENT[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim")}),
        tiny("DeepseekV2Config", **LATENT),
        tiny("Glm4MoeLiteConfig", **LATENT),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_latent_attention_runs_on_ranks(config: Any) -> None:
    """Its values are of another size than its keys; `judge.families` compares the rows."""
    check_spans(config, "t")


@pytest.mark.parametrize("method", ["awq", "gptq", "no-such-method", None])
def test_quantized_weights_that_cannot_be_read_here(method: str | None) -> None:
    config = family_config("llama", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"quant_method = {method!r}.*, which cannot be loaded here"):
        check_quantization(config, "t")
    check_config_structure(config, "t")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "glm4v"])
def test_vision_language_families_that_are_no_causal_lm(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=f"family '{family}', which transformers does not load"):
        load_full_config(tmp_path)


@pytest.mark.parametrize("missing", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_config_without_special_tokens_gives_a_draft(missing: str) -> None:
    config = SimpleNamespace(**family_config("llama").to_dict())
    delattr(config, missing)
    assert build_draft_config(config, DraftSection(vocab_size=64)).draft_vocab_size == 64


def renamed(folder: Path, renames: dict[str, str], extra: dict[str, Tensor] | None = None) -> Path:
    """A copy of a target's folder whose tensors have other names, and some more."""
    copy = shutil.copytree(build_tiny_target(folder / "tiny"), folder / "other")
    tensors = load_file(copy / "model.safetensors")
    tensors = {renames.get(name, name): tensor for name, tensor in tensors.items()} | (extra or {})
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.word_embeddings.weight", HEAD),
        ("transformer.wte.weight", HEAD),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("backbone.embeddings.weight", HEAD),
        ("model.language_model.embed_tokens.weight", HEAD),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("embed.weight", "head.weight"),
    ],
)
def test_embedding_and_head_are_found_by_the_ends_of_their_names(
    embedding: str, head: str, tmp_path: Path
) -> None:
    """Neither the weights of further guesses, as DeepSeek-V3 has them, nor a tower's are taken for them."""
    others = ("model.layers.8.embed_tokens.weight", "model.layers.8.shared_head.head.weight")
    extra = {
        name: torch.ones(4, 4) for name in (*others, "vision_tower.embeddings.weight", "mtp.lm_head.weight")
    }
    folder = renamed(tmp_path, {EMBEDDING: embedding, HEAD: head}, extra)
    check_weight_names(folder)
    expected = load_embedding_and_head(tmp_path / "tiny")
    for found, wanted in zip(load_embedding_and_head(folder), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("renames", "extra", "message"),
    [
        ({EMBEDDING: "model.strange.weight"}, {}, "is the embedding; looked for .* embed_tokens.weight"),
        ({HEAD: "model.strange.weight"}, {}, "is the head; looked for were names that end in lm_head.weight"),
        ({HEAD: "lm_head.qweight"}, {}, r"its head is quantized \(lm_head.qweight\)"),
        ({HEAD: "lm_head.weight_packed"}, {}, r"its head is quantized \(lm_head.weight_packed\)"),
        (
            {},
            {HEAD: torch.zeros(97, 64).to(torch.float8_e4m3fn)},
            r"head is quantized \(lm_head.weight of F8_E4M3",
        ),
        ({}, {EMBEDDING: torch.zeros(97, 64, dtype=torch.uint8)}, "embedding is quantized .* of U8"),
        ({}, {HEAD: torch.zeros(3, 4)}, r"lm_head.weight is \[3, 4\], and config.json says"),
        ({}, {"lm_head.bias": torch.zeros(97)}, r"has a bias in its head \(lm_head.bias\)"),
        ({}, {"draft.embed_tokens.weight": torch.zeros(3, 4)}, "several tensors that may be the embedding"),
    ],
)
def test_weights_that_are_refused_by_name(
    renames: dict[str, str], extra: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    folder = renamed(tmp_path, renames, extra)
    for judge in (check_weight_names, load_embedding_and_head):
        with pytest.raises(ValueError, match=message):
            judge(folder)


@pytest.mark.parametrize("packed", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_a_quantized_body_is_not_looked_at(packed: torch.dtype, tmp_path: Path) -> None:
    body = "model.layers.0.mlp.down_proj."
    extra = {
        body + name: torch.zeros(4, 4).to(packed) for name in ("qweight", "weight_packed", "weight_scale_inv")
    }
    folder = renamed(tmp_path, {}, extra)
    expected = load_embedding_and_head(tmp_path / "tiny")
    for found, wanted in zip(load_embedding_and_head(folder), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_capped_target_is_not_loaded(tmp_path: Path) -> None:
    config, _ = REFUSED["gemma2"]
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no constant factor"):
        load_target(TargetSection(path=str(tmp_path), aux_layers=AUX_LAYERS), dtype="float32")
