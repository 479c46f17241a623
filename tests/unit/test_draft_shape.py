"""The draft's shape is its own: derived from any target's config, stated in a recipe, refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

from eagle3_ds.algorithms.eagle3 import DraftModel, Eagle3Shape, build_draft_config, draft_notes
from eagle3_ds.attention.rotary import rotary_frequencies, rotate
from eagle3_ds.config import DraftSection, Recipe, dump_recipe, load_recipe
from eagle3_ds.draft import (
    DRAFT_EMBEDDING,
    VocabularyMap,
    load_draft_embedding,
    project_embedding,
    save_draft_embedding,
)
from eagle3_ds.export import export_speculators, export_vllm, load_embedding, load_export, verify_export
from eagle3_ds.targets import check_supported
from tests.unit.tiny_families import family_config

PLAIN = {"rope_type": "default"}
GPT_OSS_YARN = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False,
}  # fmt: skip
MISTRAL4_YARN = {
    "rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# family of transformers -> hidden size, MLP width, query heads, key heads, head size, rotary settings
DEFAULTS: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "llama": (4096, 11008, 32, 32, 128, {"rope_theta": 1e4, **PLAIN}),
    "qwen3_next": (2048, 5632, 16, 2, 256, {"rope_theta": 1e4, **PLAIN}),
    "qwen3_5": (4096, 12288, 16, 4, 256, {"rope_theta": 1e4, **PLAIN}),
    "qwen3_5_moe": (2048, 6144, 16, 2, 256, {"rope_theta": 1e4, **PLAIN}),
    "glm4": (4096, 13696, 32, 2, 128, {"rope_theta": 1e4, **PLAIN}),
    # 96 query heads do not divide 4096, and give no whole size of a head.
    "glm4_moe": (4096, 10944, 32, 8, 128, {"rope_theta": 1e4, **PLAIN}),
    "gemma3n": (2048, 16384, 8, 2, 256, {"rope_theta": 1e6, **PLAIN}),
    "gemma4": (2304, 9216, 18, 6, 128, {"rope_theta": 1e6, **PLAIN}),
    "mistral4": (4096, 12288, 32, 8, 128, {"rope_theta": 1e4, **MISTRAL4_YARN}),
    "deepseek_v3": (7168, 18432, 56, 8, 128, {"rope_theta": 1e4, **PLAIN}),
    "deepseek_v4": (4096, 12288, 32, 8, 128, {"rope_theta": 1e4, **PLAIN}),
    "nemotron_h": (4096, 21504, 32, 8, 128, {"rope_theta": 1e4, **PLAIN}),
    "cohere2": (8192, 22528, 64, 64, 128, {"rope_theta": 1e4, **PLAIN}),
    "lfm2": (2560, 12288, 32, 8, 80, {"rope_theta": 1e6, **PLAIN}),
    "gpt_oss": (2880, 8640, 64, 8, 64, {"rope_theta": 150000.0, **GPT_OSS_YARN}),
    "phi3": (3072, 8192, 32, 32, 96, {"rope_theta": 1e4, **PLAIN}),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_default_target_gives_a_draft_that_servers_run(family: str) -> None:
    target = CONFIG_MAPPING[family]().get_text_config()
    check_supported(target, "t")
    draft = build_draft_config(target, DraftSection())
    found = (
        draft.hidden_size, draft.intermediate_size, draft.num_attention_heads, draft.num_key_value_heads,
        draft.head_dim, draft.rope_parameters,
    )  # fmt: skip
    assert found == DEFAULTS[family]
    assert draft.hidden_size % draft.num_attention_heads == 0  # or transformers refuses the export
    assert draft.eos_token_id == target.eos_token_id and draft.rms_norm_eps > 0
    frequencies = rotary_frequencies(draft, torch.device("cpu")).frequencies
    assert frequencies.shape == (draft.head_dim // 2,) and frequencies.isfinite().all()


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v3", "56 query heads and 8 key heads of 128 channels, because .* latent"),
        ("gpt_oss", "intermediate_size 8640, 3 times the hidden size: the target has experts"),
        ("nemotron_h", "a rotary embedding of theta 10000: the target has none"),
        ("olmo", "norms with an epsilon of 1e-06"),
        ("glm4", "turns whole heads; the target turns a part of each"),
    ],
)
def test_what_is_not_plainly_the_targets_is_told(family: str, words: str) -> None:
    target = CONFIG_MAPPING[family]().get_text_config()
    assert re.search(words, "\n".join(draft_notes(target, DraftSection())))


def test_an_ordinary_target_needs_no_notes() -> None:
    assert draft_notes(family_config("llama"), DraftSection(vocab_size=64)) == []


def test_a_recipe_states_its_own_shape() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    rope = {"theta": 5e5, "partial_factor": 0.5, "scaling": scaling}
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "num_kv_heads": 1}
    section = DraftSection.model_validate({**sizes, "head_dim": 24, "rope": rope})
    draft = build_draft_config(family_config("gpt_oss"), section)
    assert (draft.hidden_size, draft.intermediate_size, draft.head_dim) == (48, 80, 24)
    assert (draft.num_attention_heads, draft.num_key_value_heads) == (3, 1)
    assert draft.rope_parameters == {
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        **scaling,
    }
    assert DraftModel(draft).fc.weight.shape == (48, 3 * 32)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"head_dim": 63}, "head_dim is 63, but it should be even"),
        ({"rope": {"theta": 0.0}}, r"rope.theta\s+Input should be greater than 0"),
        ({"rope": {"partial_factor": 0.0}}, r"rope.partial_factor\s+Input should be greater than 0"),
        ({"rope": {"partial_factor": 1.5}}, r"rope.partial_factor\s+Input should be less than or equal to 1"),
        ({"head_dim": 64, "rope": {"partial_factor": 0.05}}, "turns 3 of the 64 channels"),
        ({"head_dim": 64, "rope": {"partial_factor": 0.01}}, "turns 0 of the 64 channels"),
        ({"rope": {"scaling": {"rope_type": "ntk"}}}, "rope_type is 'ntk', but it should be one of linear"),
        ({"rope": {"scaling": {"factor": 2.0}}}, "rope_type is None"),
        ({"rope": {"scaling": {"rope_type": "linear"}}}, "'linear' lacks factor"),
        (
            {"rope": {"scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0}}},
            "has rope_theta: it takes factor",
        ),
        ({"rope": {"scaling": {"rope_type": "linear", "factor": 0}}}, "factor is 0, .* a positive number"),
        (
            {
                "head_dim": 8,
                "rope": {
                    "scaling": {
                        "rope_type": "longrope",
                        "short_factor": [1.0, 1.0],
                        "long_factor": [1.0, 1.0],
                        "original_max_position_embeddings": 64,
                    }
                },
            },
            "short_factor has 2 numbers, but it should have one for each of the 4 pairs",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DraftSection.model_validate(section)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"num_heads": 3}, "draft.num_heads = 3 is not a multiple of draft.num_kv_heads = 2"),
        ({"num_heads": 12}, "draft.num_heads = 12 does not divide draft.hidden_size = 32"),
        ({"rope": {"partial_factor": 0.4}}, "turns 3 of the 8 channels"),
    ],
)
def test_what_only_the_target_shows_is_refused_too(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_draft_config(family_config("llama"), DraftSection.model_validate({"vocab_size": 64, **section}))


def test_a_partial_rotation_leaves_the_rest_of_a_head_and_its_transpose_turns_back() -> None:
    config = LlamaConfig(
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    )
    rotary = rotary_frequencies(config, torch.device("cpu"))
    assert torch.allclose(rotary.frequencies, 100.0 ** -(torch.arange(4) / 4))
    cos, sin = rotary.angles(torch.arange(5))
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 8:], x[..., 8:]) and torch.equal(turned[0], x[0])
    assert (turned[1:, :, :8] - x[1:, :, :8]).norm(dim=-1).min() > 0.1
    assert torch.allclose(rotate(turned, cos, -sin), x, atol=1e-6)


def test_a_narrower_embedding_keeps_the_strongest_directions_and_the_mean_length() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(50, 4, generator=generator) @ torch.randn(4, 12, generator=generator)
    narrow = project_embedding(low_rank, 4)
    assert torch.allclose(narrow @ narrow.T, low_rank @ low_rank.T, atol=1e-4)
    full = torch.randn(50, 12, generator=generator)
    assert torch.allclose(project_embedding(full, 5).norm(), full.norm(), rtol=1e-5)
    assert torch.equal(project_embedding(full, 5), project_embedding(full, 5))
    wide = project_embedding(full, 15)
    assert torch.equal(wide[:, :12], full) and not wide[:, 12:].any()


def test_the_runs_own_embedding_comes_back_or_is_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no {DRAFT_EMBEDDING}"):
        load_draft_embedding(tmp_path, (6, 4))
    embedding = torch.randn(6, 4)
    save_draft_embedding(embedding, tmp_path)
    assert torch.equal(load_draft_embedding(tmp_path, (6, 4)), embedding)
    with pytest.raises(ValueError, match=r"embedding of \[6, 4\], the draft needs \[6, 8\]"):
        load_draft_embedding(tmp_path, (6, 8))


SHAPED = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "head_dim": 12,
    "rope": {"theta": 500.0, "partial_factor": 0.5, "scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip


def shaped_draft() -> tuple[DraftModel, VocabularyMap, torch.Tensor]:
    torch.manual_seed(0)
    draft = DraftModel(build_draft_config(family_config("llama"), DraftSection.model_validate(SHAPED)))
    return draft, VocabularyMap.from_counts(torch.arange(97), 40), torch.randn(97, 24)


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_a_shape_of_its_own_goes_through_an_export_and_back(layout: str, tmp_path: Path) -> None:
    draft, vocabulary, embedding = shaped_draft()
    folder = tmp_path / "draft"
    if layout == "vllm":
        export_vllm(draft.state_dict(), draft.config, vocabulary, folder, "float32", embedding=embedding)
    else:
        export_speculators(
            draft.state_dict(), draft.config, vocabulary, embedding, folder, "org/t", ["L"], "float32"
        )
    keys = json.loads((folder / "config.json").read_text())
    layer = keys if layout == "vllm" else keys["transformer_layer_config"]
    assert keys["target_hidden_size"] == 32 and layer["head_dim"] == 12 and layer["hidden_size"] == 24
    assert layer["rope_parameters"]["partial_rotary_factor"] == layer["partial_rotary_factor"] == 0.5
    assert layer["rope_theta"] == 500.0 and layer["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    config, _, _ = load_export(folder)
    assert config.rope_parameters == draft.config.rope_parameters
    assert torch.equal(load_embedding(folder), embedding)
    assert verify_export(folder, draft, vocabulary, embedding=embedding) == 0.0
    with pytest.raises(ValueError, match="another embedding than the draft was trained with"):
        verify_export(folder, draft, vocabulary, embedding=embedding + 1)
    if layout == "vllm":
        assert AutoConfig.from_pretrained(folder).rope_parameters == draft.config.rope_parameters
        tensors = load_file(folder / "model.safetensors")
        del tensors["embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"has no embed_tokens.weight"):
            load_export(folder)


def test_rotary_settings_as_transformers_4_wrote_them_keep_the_part_that_turns(tmp_path: Path) -> None:
    draft, vocabulary, embedding = shaped_draft()
    folder = export_vllm(draft.state_dict(), draft.config, vocabulary, tmp_path / "d", embedding=embedding)
    keys = json.loads((folder / "config.json").read_text())
    del keys["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(keys))
    assert load_export(folder)[0].rope_parameters == draft.config.rope_parameters


def test_an_embedding_where_none_belongs_is_refused(tmp_path: Path) -> None:
    draft, vocabulary, embedding = shaped_draft()
    with pytest.raises(ValueError, match=r"hidden size is 24, the target's 32: .* Give it"):
        export_vllm(draft.state_dict(), draft.config, vocabulary, tmp_path / "d")
    with pytest.raises(ValueError, match=r"the embedding is \[96, 24\]"):
        export_vllm(draft.state_dict(), draft.config, vocabulary, tmp_path / "d", embedding=embedding[1:])


def test_the_planner_counts_the_shape() -> None:
    draft, _, _ = shaped_draft()
    shape = Eagle3Shape.of(draft.config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in draft.parameters())
    assert (shape.angle_size, shape.target_hidden_size) == (6, 32)
    # Keys and values of 2 heads of 12 channels, 2 bytes each.
    assert shape.cache_bytes(2) == 2 * 2 * 12 * 2


def test_a_recipe_with_a_rope_section_goes_through_yaml(tmp_path: Path) -> None:
    changes = [f"draft.{key}={json.dumps(value)}" for key, value in SHAPED.items()]
    recipe = load_recipe("recipes/quickstart.yaml", changes)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    again: Recipe = load_recipe(tmp_path / "r.yaml")
    assert again == recipe and again.draft.rope is not None and again.draft.rope.theta == 500.0
