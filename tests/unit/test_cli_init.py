"""`train.init_from`: an exported draft in either layout, taken over exactly, or refused by what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.config import DraftSection, Recipe, load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_speculators, export_vllm
from eagle3_ds.train.initial_draft import load_initial_draft, write_initial_draft

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
TARGET = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
)
VOCABULARY = VocabularyMap.from_counts(torch.arange(96) % 7, 40)


@pytest.fixture
def draft() -> DraftModel:
    torch.manual_seed(0)
    return DraftModel(build_draft_config(TARGET, DraftSection(vocab_size=40)))


def make_recipe(folder: Path, init_from: Path, *overrides: str) -> Recipe:
    TARGET.save_pretrained(folder / "target")
    places = [f"target.path={folder / 'target'}", f"output_dir={folder}", f"train.init_from={init_from}"]
    return load_recipe(RECIPE, ["target.build=null", "draft.vocab_size=40", *places, *overrides])


def export(layout: str, draft: DraftModel, folder: Path, dtype: str) -> Path:
    if layout == "vllm":
        return export_vllm(draft.state_dict(), draft.config, VOCABULARY, folder, dtype)
    embedding = torch.zeros(96, 32)
    return export_speculators(
        draft.state_dict(), draft.config, VOCABULARY, embedding, folder, "org/target", ["Llama"], dtype
    )


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_weights_and_vocabulary_are_taken_over(layout: str, draft: DraftModel, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, export(layout, draft, tmp_path / "export", "float32"))
    assert write_initial_draft(recipe).equals(VOCABULARY)
    written, expected = load_file(tmp_path / "draft-initial.safetensors"), draft.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_bf16_export_starts_as_fp32_masters(draft: DraftModel, tmp_path: Path) -> None:
    state, _ = load_initial_draft(
        make_recipe(tmp_path, export("vllm", draft, tmp_path / "export", "bfloat16"))
    )
    assert all(
        torch.equal(state[name], tensor.bfloat16().float()) for name, tensor in draft.state_dict().items()
    )


def test_another_geometry_is_refused_by_its_keys(draft: DraftModel, tmp_path: Path) -> None:
    folder = export("vllm", draft, tmp_path / "export", "float32")
    with pytest.raises(
        ValueError,
        match=r"intermediate_size is 48 there and 64 here; draft_vocab_size is 40 there and 32 here",
    ):
        load_initial_draft(make_recipe(tmp_path, folder, "draft.intermediate_size=64", "draft.vocab_size=32"))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    keys = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


def test_rotary_settings_as_transformers_4_wrote_them_are_read(draft: DraftModel, tmp_path: Path) -> None:
    folder = export("vllm", draft, tmp_path / "export", "float32")
    rewrite(folder, rope_parameters=None)
    load_initial_draft(make_recipe(tmp_path, folder))
    rewrite(folder, rope_theta=1e4)
    with pytest.raises(ValueError, match="rope_parameters is .*10000.0.* there and .*500000.0.* here"):
        load_initial_draft(make_recipe(tmp_path, folder))


def test_a_draft_that_computes_otherwise_is_refused(draft: DraftModel, tmp_path: Path) -> None:
    folder = export("speculators", draft, tmp_path / "export", "float32")
    rewrite(folder, norm_before_residual=True)
    with pytest.raises(ValueError, match="norm_before_residual is True there and None here"):
        load_initial_draft(make_recipe(tmp_path, folder))


def test_a_flag_without_its_tensors_is_refused(draft: DraftModel, tmp_path: Path) -> None:
    """A server would take random norms for it in silence."""
    folder = export("vllm", draft, tmp_path / "export", "float32")
    for flag, tensor in (("fc_norm", "fc_norm.0.weight"), ("norm_before_fc", "input_norm.weight")):
        rewrite(folder, **{"fc_norm": False, "norm_before_fc": False, flag: True})
        with pytest.raises(ValueError, match=f"{flag} is True and the tensor {tensor} is not there"):
            load_initial_draft(make_recipe(tmp_path, folder))


def test_what_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train.init_from: .*holds no config.json: it is not an exported draft"
    ):
        load_initial_draft(make_recipe(tmp_path, tmp_path / "nothing"))
