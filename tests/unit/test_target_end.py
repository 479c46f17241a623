"""Norm and head of a target that others run, found in its files without building the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eagle3_ds.targets import check_target_end, load_target_end, load_text_config
from tests.unit.tiny_families import (
    FAMILIES,
    OTHERS,
    family_config,
    other_config,
    random_model,
    vision_language_config,
)

UNSCALED = [family for family in OTHERS if family != "falcon_h1"]


@pytest.mark.parametrize("family", [*FAMILIES, *UNSCALED, "gemma3", "gpt_neox", "nemotron_h"])
def test_what_follows_the_last_layer_is_the_models_own(family: str, tmp_path: Path) -> None:
    model = random_model(config_of(family))
    model.save_pretrained(tmp_path)
    ids, before = torch.randint(97, (1, 20)), list[torch.Tensor]()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    (norm,) = (
        module
        for name, module in decoder.named_children()
        if name in ("norm", "final_layernorm", "final_layer_norm", "norm_f")
    )
    norm.register_forward_pre_hook(lambda module, given: before.append(given[0][0]))
    logits = model(input_ids=ids, use_cache=False).logits[0]
    check_target_end(tmp_path)
    end = load_target_end(tmp_path, load_text_config(tmp_path), torch.float32)
    teacher, tokens = end.finish(before[0], is_normed=False)
    torch.testing.assert_close(teacher @ end.head.T, logits)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(end.finish(teacher, is_normed=True)[1], tokens)


def config_of(family: str) -> object:
    if family == "gemma3":
        return vision_language_config()
    if family in FAMILIES:
        return family_config(family)
    if family in OTHERS:
        return other_config(family)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**sizes, num_hidden_layers=4, use_parallel_residual=False)
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    pattern = {"hybrid_override_pattern": "M*-M", "head_dim": 8, "num_key_value_heads": 2}
    return transformers.NemotronHConfig(**sizes, **mamba, **pattern, num_hidden_layers=4)


def test_a_quantized_body_is_not_looked_at_and_a_lost_or_doubled_norm_is_told(tmp_path: Path) -> None:
    random_model(family_config("qwen3")).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    body = {name for name in tensors if ".layers." in name and tensors[name].dim() == 2}
    packed = {f"{name}_packed": tensors.pop(name).to(torch.float8_e4m3fn) for name in body}

    def folder(**changes: torch.Tensor | None) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "plain", copy, dirs_exist_ok=True)
        kept = {**tensors, **packed, **{name.replace("__", "."): value for name, value in changes.items()}}
        save_file(
            {name: value for name, value in kept.items() if value is not None}, copy / "model.safetensors"
        )
        return copy

    config = load_text_config(tmp_path / "plain")
    quantized = load_target_end(folder(), config, torch.float32)
    expected = load_target_end(tmp_path / "plain", config, torch.float32)
    hidden = torch.randn(5, 32)
    assert torch.equal(quantized.finish(hidden, False)[0], expected.finish(hidden, False)[0])
    for judge in (check_target_end, lambda path: load_target_end(path, config, torch.float32)):
        with pytest.raises(ValueError, match="one tensor whose name ends in norm.weight, .* and has none"):
            judge(folder(model__norm__weight=None))
        with pytest.raises(ValueError, match="and has several, draft.norm.weight, model.norm.weight"):
            judge(folder(draft__norm__weight=torch.ones(32)))
        with pytest.raises(ValueError, match="none of its .* tensors is the head"):
            judge(folder(lm_head__weight=None))
