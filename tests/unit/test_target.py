"""Capture against transformers, the token argmax against the full product, and the refusals of a target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from eagle3_ds.config import TargetSection
from eagle3_ds.targets import (
    AuxCapture,
    capture_hidden_states,
    choose_aux_layers,
    load_embedding_and_head,
    load_target,
    load_text_config,
    load_tokenizer,
    target_fingerprint,
    teacher_tokens,
)
from tests.unit.tiny_families import AUX_LAYERS, SIZES, random_model, vision_language_config
from tests.unit.tiny_target import build_tiny_target, tiny_build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.mark.parametrize("wanted", [None, (0, 3, 6)])
def test_capture_equals_hidden_states(folder: Path, wanted: tuple[int, int, int] | None) -> None:
    target = load_target(TargetSection(path=str(folder), aux_layers=wanted), dtype="float32")
    ids = torch.randint(0, 300, (37,), generator=torch.Generator().manual_seed(0))
    aux, teacher = capture_hidden_states(target, ids)
    reference = target.model(input_ids=ids[None], output_hidden_states=True)
    expected = torch.cat([reference.hidden_states[layer][0] for layer in target.aux_layers], dim=-1)
    assert torch.equal(aux, expected)
    assert torch.equal(teacher, reference.hidden_states[-1][0])
    assert torch.allclose(teacher @ target.head.T, reference.logits[0], atol=1e-5)
    assert torch.equal(
        teacher_tokens(teacher, target.head, chunk=77, rows=10), reference.logits[0].argmax(-1)
    )


def test_capture_does_not_evaluate_the_head(folder: Path) -> None:
    target = load_target(TargetSection(path=str(folder)), dtype="float32")

    def refuse(*unused: object) -> None:
        raise AssertionError("the head was evaluated")

    handle = target.model.lm_head.register_forward_pre_hook(refuse)
    capture_hidden_states(target, torch.arange(5))
    handle.remove()


def test_hooks_are_gone_after_use(folder: Path) -> None:
    target = load_target(TargetSection(path=str(folder)), dtype="float32")
    with pytest.raises(RuntimeError), AuxCapture(target.model.model, target.aux_layers):
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in target.model.model.layers)


def test_teacher_token_ties_go_to_the_lowest_id() -> None:
    hidden = torch.ones(3, 4)
    head = torch.zeros(20, 4)
    head[[5, 6, 13]] = 1.0
    for chunk in (1, 6, 7, 20, 50):
        assert teacher_tokens(hidden, head, chunk=chunk, rows=2).tolist() == [5, 5, 5]
    assert teacher_tokens(hidden[:0], head).shape == (0,)


def test_embedding_and_head_single_sharded_and_tied(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    for path in (folder, sharded):
        embedding, head = load_embedding_and_head(path)
        assert torch.equal(embedding, model.model.embed_tokens.weight)
        assert torch.equal(head, model.lm_head.weight)
    tied = tmp_path / "tied"
    config = LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tied)
    embedding, head = load_embedding_and_head(tied, torch.bfloat16)
    assert torch.equal(embedding, head) and head.dtype == torch.bfloat16


def test_missing_head_and_missing_shard_are_told(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_embedding_and_head(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="none of its .* tensors is the head; looked for .* lm_head.weight"):
        load_embedding_and_head(tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002.safetensors, which the folder lacks"):
        load_embedding_and_head(tmp_path)


def test_aux_layer_rule() -> None:
    assert choose_aux_layers(32) == (2, 16, 29)
    assert choose_aux_layers(7) == (2, 3, 4)
    assert choose_aux_layers(4, (0, 1, 3)) == (0, 1, 3)
    with pytest.raises(ValueError, match="the target has 6 layers"):
        choose_aux_layers(6)
    for wrong in ((2, 2, 3), (3, 2, 1), (1, 2, 8)):
        with pytest.raises(ValueError, match="must ascend"):
            choose_aux_layers(8, wrong)


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_target(TargetSection(path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="no config.json"):
        load_target(TargetSection(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(
        ValueError,
        match="family 'bloom', whose config lacks max_position_embeddings",
    ):
        load_target(TargetSection(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="cannot read its config.json"):
        load_target(TargetSection(path=str(tmp_path)))


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        "'nobody/nothing' is neither a folder here nor a model that could be fetched from the hub "
        ".*download the model"
    )
    with pytest.raises(ValueError, match=message):
        load_target(TargetSection(path="nobody/nothing"))


def test_a_target_that_is_still_to_be_built_is_told(tmp_path: Path) -> None:
    section = TargetSection(path=str(tmp_path / "absent"), build=tiny_build())
    with pytest.raises(
        ValueError, match="absent' is not built yet: `eagle3-ds prepare` with this recipe builds it"
    ):
        load_tokenizer(section)


def test_a_head_with_a_bias_is_refused(folder: Path, tmp_path: Path) -> None:
    config = PhiConfig(**{**SIZES, "num_hidden_layers": 7, "partial_rotary_factor": 1.0, "head_dim": 8})
    config.rms_norm_eps = 1e-5
    PhiForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a bias in its head"):
        load_target(TargetSection(path=str(tmp_path)), dtype="float32")


def test_text_of_a_vision_language_target(folder: Path, tmp_path: Path) -> None:
    """Loaded, captured, and its embedding and head found under the names of such a checkpoint."""
    model = random_model(vision_language_config())
    model.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    target = load_target(TargetSection(path=str(tmp_path), aux_layers=AUX_LAYERS), dtype="float32")
    ids = torch.randint(97, (20,), generator=torch.Generator().manual_seed(0))
    aux, teacher = capture_hidden_states(target, ids)
    reference = target.model(input_ids=ids[None], output_hidden_states=True)
    assert torch.equal(aux, torch.cat([reference.hidden_states[layer][0] for layer in AUX_LAYERS], dim=-1))
    embedding, head = load_embedding_and_head(tmp_path)
    assert torch.equal(embedding, target.embedding)
    assert torch.allclose(teacher @ head.T, reference.logits[0], atol=1e-4)


def test_a_vision_language_target_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    with pytest.raises(ValueError, match="'mistral3', which transformers does not load as a causal"):
        load_text_config(tmp_path)


def test_fingerprint_tells_targets_apart(folder: Path, tmp_path: Path) -> None:
    first = target_fingerprint(folder, (2, 3, 4), "float32")
    assert first == target_fingerprint(folder, (2, 3, 4), "float32")
    other = build_tiny_target(tmp_path / "other", seed=1)
    second = target_fingerprint(other, (1, 3, 4), "bfloat16")
    assert first["tokenizer"] == second["tokenizer"]
    assert all(first[field] != second[field] for field in ("target_weights", "aux_layers", "target_dtype"))
    with (other / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert target_fingerprint(other, (1, 3, 4), "bfloat16")["tokenizer"] != first["tokenizer"]
