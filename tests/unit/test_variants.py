"""The norms that variants of EAGLE-3 add: a draft serves as it was trained, an export says what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import DraftModel, Eagle3Shape, UnrollSettings, build_draft_config
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.algorithms.eagle3.variants import FLAGS
from eagle3_ds.attention import patch_attention
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import DraftCache, VocabularyMap
from eagle3_ds.export import export_speculators, export_vllm, load_export, verify_export
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import PackedSequence, SpanPlan, prepare_usp_input

V, VD, H, LENGTH, K = 50, 32, 16, 9, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eagle3.1": {"aux_norm": True, "norm_output": True},
    "before_fc": {"norm_before_fc": True},
    "before_residual": {"norm_before_residual": True},
    "all": dict.fromkeys(("aux_norm", "norm_output", "norm_before_fc", "norm_before_residual"), True),
}


def make_draft(variant: str, num_aux_layers: int = 3, num_layers: int = 1) -> DraftModel:
    target = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    section = DraftSection(vocab_size=VD, num_layers=num_layers, **VARIANTS[variant])
    draft = DraftModel(build_draft_config(target, section, num_aux_layers))
    for parameter in draft.parameters():
        # Large enough for the non-linear parts to matter, and norms that are not one.
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return draft


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_served_guess_is_a_step_of_training(variant: str, num_layers: int) -> None:
    """Slot i behind verified slots, fed with the true tokens: the chain gives the unroll's hidden states."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (LENGTH,), generator=generator)
    aux, embedding = torch.randn(LENGTH, 3 * H, generator=generator), torch.randn(V, H, generator=generator)
    mask = torch.ones(LENGTH, dtype=torch.bool)
    pack = PackedSequence(tokens, mask, (LENGTH,), tokens, aux, torch.zeros(LENGTH, H))
    trained: list[torch.Tensor] = []

    def note(hidden: torch.Tensor) -> torch.Tensor:
        trained.append(hidden.detach())
        return hidden

    draft, served = make_draft(variant, num_layers=num_layers), make_draft(variant, num_layers=num_layers)
    kernel = select_kernel("reference", torch.device("cpu"), torch.float32, 8)
    batch = prepare_usp_input(pack, SpanPlan.make((LENGTH,)), 0, 0, TTTSupervision(K))
    patch_attention(draft, kernel).unroll(batch, embedding, UnrollSettings(K, "recompute", 2**20), note)
    for slot in range(1, LENGTH - K):
        cache = DraftCache(num_layers)
        embeds = embedding[tokens[1 : slot + 2]]
        hidden = served.decode(embeds, served.project_aux(aux[: slot + 1]), torch.arange(slot + 1), cache)[
            -1:
        ]
        for step in range(K):
            assert torch.allclose(hidden[0], trained[step][slot], rtol=1e-4, atol=1e-5), (slot, step)
            if step + 1 < K:
                token = embedding[tokens[slot + 2 + step]][None]
                position = torch.tensor([slot + 1 + step])
                hidden = served.decode(token, served.passed_on(hidden), position, cache)


@pytest.mark.parametrize("num_aux_layers", [3, 5])
@pytest.mark.parametrize("layout", ["vllm", "speculators"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_says_what_the_draft_is(
    variant: str, layout: str, num_aux_layers: int, tmp_path: Path
) -> None:
    draft = make_draft(variant, num_aux_layers)
    vocabulary = VocabularyMap.from_counts(torch.arange(V), VD)
    state, folder = draft.state_dict(), tmp_path / "draft"
    if layout == "vllm":
        export_vllm(state, draft.config, vocabulary, folder, "float32")
    else:
        export_speculators(state, draft.config, vocabulary, torch.zeros(V, H), folder, "t", [], "float32")
    assert verify_export(folder, draft, vocabulary) == 0.0
    keys = json.loads((folder / "config.json").read_text())
    wanted = {"fc_norm" if name == "aux_norm" else name for name in VARIANTS[variant]}
    assert {name for name in FLAGS if keys.get(name)} == wanted
    if layout == "speculators":
        # Absent, vLLM takes norm_before_residual for true.
        assert set(FLAGS) <= keys.keys()
    config, loaded, _ = load_export(folder)
    assert loaded.keys() == state.keys()
    assert {name for name in FLAGS if getattr(config, name, False)} == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_planner_counts_its_parameters(variant: str) -> None:
    draft = make_draft(variant, 4)
    sizes = Eagle3Shape.of(draft.config).parameter_sizes
    assert sorted(sizes) == sorted(parameter.numel() for parameter in draft.parameters())


def test_names_of_the_tensors_are_the_servers(tmp_path: Path) -> None:
    names = make_draft("all", 2).state_dict().keys()
    assert {"fc_norm.0.weight", "fc_norm.1.weight", "input_norm.weight", "fc.weight"} <= names
