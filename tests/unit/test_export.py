"""Exports: exact names and shapes of each layout, the way back, and a check that can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.attention.rotary import rotary_frequencies
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import VocabularyMap, sliding_window, window_keys
from eagle3_ds.export import export_speculators, export_vllm, load_speculators, load_vllm, verify_export
from eagle3_ds.export.folder import draft_config
from eagle3_ds.export.vllm import sglang_layers, tell_layers

V, VD, H, HEAD, INNER = 96, 40, 32, 8, 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(params=[1, 2])
def draft(request: pytest.FixtureRequest) -> DraftModel:
    target = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=256,
        rope_parameters=LLAMA3,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    return DraftModel(build_draft_config(target, DraftSection(vocab_size=VD, num_layers=request.param)))


@pytest.fixture
def vocabulary() -> VocabularyMap:
    return VocabularyMap.from_counts(
        torch.randint(0, 50, (V,), generator=torch.Generator().manual_seed(0)), VD
    )


def vllm(draft: DraftModel, vocabulary: VocabularyMap, folder: Path, **options: Any) -> Path:
    return export_vllm(draft.state_dict(), draft.config, vocabulary, folder, **options)


def speculators(draft: DraftModel, vocabulary: VocabularyMap, folder: Path, **options: Any) -> Path:
    embedding = torch.arange(V * H).view(V, H) / 1024
    names: dict[str, Any] = {"verifier": "org/target", "verifier_architectures": ["LlamaForCausalLM"]}
    return export_speculators(
        draft.state_dict(), draft.config, vocabulary, embedding, folder, **names | options
    )


Export = Callable[..., Path]
BOTH = pytest.mark.parametrize("export", [vllm, speculators])


def test_vllm_names_and_shapes(draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path) -> None:
    folder = vllm(draft, vocabulary, tmp_path / "draft", max_position=1024)
    expected = {
        "fc.weight": (H, 3 * H),
        "norm.weight": (H,),
        "lm_head.weight": (VD, H),
        "d2t": (VD,),
        "t2d": (V,),
    }
    for layer, width in enumerate([2 * H, H][: draft.config.num_hidden_layers]):
        name = "midlayer" if layer == 0 else f"layers.{layer}"
        norms = ["input_layernorm", "post_attention_layernorm"] + ["hidden_norm"] * (layer == 0)
        expected |= {f"{name}.{norm}.weight": (H,) for norm in norms}
        expected |= {
            f"{name}.self_attn.q_proj.weight": (4 * HEAD, width),
            f"{name}.self_attn.k_proj.weight": (2 * HEAD, width),
            f"{name}.self_attn.v_proj.weight": (2 * HEAD, width),
            f"{name}.self_attn.o_proj.weight": (H, 4 * HEAD),
            f"{name}.mlp.gate_proj.weight": (INNER, H),
            f"{name}.mlp.up_proj.weight": (INNER, H),
            f"{name}.mlp.down_proj.weight": (H, INNER),
        }
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype, tensors["fc.weight"].dtype) == (
        torch.int64,
        torch.bool,
        torch.bfloat16,
    )
    assert torch.equal(torch.arange(VD) + tensors["d2t"], tensors["t2d"].nonzero()[:, 0])


def test_vllm_config_is_read_by_transformers(
    draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    folder = vllm(draft, vocabulary, tmp_path / "draft", max_position=1024)
    keys = json.loads((folder / "config.json").read_text())
    assert keys["architectures"] == ["LlamaForCausalLMEagle3"] and keys["model_type"] == "llama"
    assert keys["rope_theta"] == 500000.0 and keys["rope_scaling"]["rope_type"] == "llama3"
    assert "eagle_config" not in keys and "eagle_aux_hidden_state_layer_ids" not in keys
    config = AutoConfig.from_pretrained(folder)
    assert config.draft_vocab_size == VD and config.max_position_embeddings == 1024
    assert config.rope_parameters == LLAMA3 and config.head_dim == HEAD and not config.tie_word_embeddings


def test_a_server_of_another_user_may_read_the_export(
    draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    vllm(draft, vocabulary, tmp_path / "draft", max_position=1024)
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "draft").iterdir())


def test_aux_layers_other_than_the_rule_are_written(
    draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    keys = json.loads(
        (vllm(draft, vocabulary, tmp_path / "a", aux_layers=(1, 4, 6)) / "config.json").read_text()
    )
    assert keys["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
    assert keys["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 3, 5]
    folder = speculators(draft, vocabulary, tmp_path / "b", aux_layers=(1, 4, 6))
    assert json.loads((folder / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]


@pytest.mark.parametrize(
    ("aux_layers", "warned"),
    [
        ((2, 4, 6), []),
        ((2,), []),
        ((3, 4, 6), ["from May 2026", '"eagle_aux_hidden_state_layer_ids": [3, 4, 6]']),
        ((5, 6), ["--json-model-override-args", "[5, 6]"]),
        ((1, 4, 6), ["from May 2026", "serve this draft by vLLM"]),
        ((0, 4), ["layer 0 has no layer before it"]),
    ],
)
def test_how_each_server_counts_is_told(
    aux_layers: tuple[int, ...], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tell_layers(aux_layers)
    told, *warnings = caplog.records
    assert str(list(aux_layers)) in told.getMessage() and str(sglang_layers(aux_layers)) in told.getMessage()
    assert len(warnings) == bool(warned)
    assert all(words in warnings[0].getMessage() for words in warned)
    # Both of SGLang's ways of reading find the states that the draft was trained with, or it is warned.
    always, since_may = (
        reading(sglang_layers(aux_layers)) for reading in (sglang_capture, sglang_capture_2026)
    )
    assert always == list(aux_layers) and (bool(warned) or since_may == list(aux_layers))


def sglang_capture(ids: list[int]) -> list[int]:
    """The layers whose inputs SGLang takes, as most families read ids."""
    return [layer + 1 for layer in ids]


def sglang_capture_2026(ids: list[int]) -> list[int]:
    """The same, as DeepSeek-like families read ids since May 2026."""
    return sglang_capture(ids) if ids[0] == 1 else ids


def test_speculators_layout(draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path) -> None:
    folder = speculators(draft, vocabulary, tmp_path / "draft", draft_tokens=7)
    keys = json.loads((folder / "config.json").read_text())
    assert keys["speculators_model_type"] == "eagle3" and keys["norm_before_residual"] is False
    assert keys["transformer_layer_config"]["model_type"] == "llama"
    assert keys["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert keys["speculators_config"]["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }
    names = load_file(folder / "model.safetensors").keys()
    assert names == draft.state_dict().keys() | {"embed_tokens.weight", "d2t", "t2d"}
    # What speculators 0.9 writes: transformers refuses a model_type that it does not know.
    assert "model_type" not in keys and keys["auto_map"] == {"": "config.Eagle3SpeculatorConfig"}


@pytest.mark.parametrize(
    ("name", "absolute"),
    [("models/target", True), ("./models/target", True), ("~/target", True), ("org/target", False)],
)
def test_a_verifier_here_is_found_from_any_folder(
    name: str,
    absolute: bool,
    draft: DraftModel,
    vocabulary: VocabularyMap,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "models" / "target").mkdir(parents=True)
    (tmp_path / "home" / "target").mkdir(parents=True)
    folder = speculators(draft, vocabulary, tmp_path / "draft", verifier=name)
    said = json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"]
    assert said == (str(Path(name).expanduser().resolve()) if absolute else name)


@BOTH
def test_way_back_in_fp32_is_exact(
    export: Export, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    folder = export(draft, vocabulary, tmp_path / "draft", dtype="float32")
    config, state, stored = (load_vllm if export is vllm else load_speculators)(folder)[:3]
    assert state.keys() == draft.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in draft.state_dict().items())
    assert torch.equal(stored.d2t, vocabulary.d2t) and torch.equal(stored.t2d, vocabulary.t2d)
    assert config.rope_parameters == draft.config.rope_parameters
    assert verify_export(folder, draft, vocabulary) == 0.0


@BOTH
def test_a_whole_vocabulary_needs_no_map(export: Export, draft: DraftModel, tmp_path: Path) -> None:
    whole = DraftModel(LlamaConfig(**draft.config.to_dict() | {"draft_vocab_size": V}))
    vocabulary = VocabularyMap.from_counts(torch.arange(V), V)
    folder = export(whole, vocabulary, tmp_path / "draft", dtype="float32")
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    stored = (load_vllm if export is vllm else load_speculators)(folder)[2]
    assert stored.equals(vocabulary)
    assert verify_export(folder, whole, vocabulary) == 0.0


@BOTH
@pytest.mark.parametrize("missing", [("d2t",), ("t2d",), ("d2t", "t2d")])
def test_a_part_of_the_vocabulary_needs_its_map(
    missing: tuple[str, ...],
    export: Export,
    draft: DraftModel,
    vocabulary: VocabularyMap,
    tmp_path: Path,
) -> None:
    file = export(draft, vocabulary, tmp_path / "draft") / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in missing}, file)
    with pytest.raises(ValueError, match="whole vocabulary"):
        (load_vllm if export is vllm else load_speculators)(file.parent)


@BOTH
def test_a_window_is_in_the_config_and_comes_back(
    export: Export, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    layers = draft.config.num_hidden_layers
    windowed = DraftModel(LlamaConfig(**draft.config.to_dict() | window_keys(48, layers)))
    windowed.load_state_dict(draft.state_dict())
    folder = export(windowed, vocabulary, tmp_path / "draft", dtype="float32")
    keys = json.loads((folder / "config.json").read_text())
    keys = keys if export is vllm else keys["transformer_layer_config"]
    assert (keys["sliding_window"], keys["layer_types"]) == (48, ["sliding_attention"] * layers)
    config = (load_vllm if export is vllm else load_speculators)(folder)[0]
    assert sliding_window(config) == 48 and sliding_window(draft.config) is None
    assert verify_export(folder, windowed, vocabulary) == 0.0


def test_layers_of_different_windows_are_refused() -> None:
    mixed = LlamaConfig(
        num_hidden_layers=2, sliding_window=48, layer_types=["sliding_attention", "full_attention"]
    )
    with pytest.raises(
        ValueError, match="all layers of a draft see sliding_window keys here, or all see everything"
    ):
        sliding_window(mixed)


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_exports_are_near(
    export: Export, dtype: str, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    assert (
        0
        < verify_export(export(draft, vocabulary, tmp_path / "draft", dtype=dtype), draft, vocabulary)
        < 0.02
    )


@BOTH
def test_a_changed_weight_rope_or_map_is_noticed(
    export: Export, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    folder = export(draft, vocabulary, tmp_path / "draft", dtype="float32")
    tensors, keys = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["norm.weight"][3] += 0.01
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ValueError, match="gives other logits than the draft"):
        verify_export(folder, draft, vocabulary)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(keys.replace("500000.0", "10000.0"))
    with pytest.raises(ValueError, match="gives other logits than the draft"):
        verify_export(folder, draft, vocabulary)
    (folder / "config.json").write_text(keys)
    other = VocabularyMap.from_counts(torch.arange(V), VD)
    with pytest.raises(ValueError, match="another vocabulary map"):
        verify_export(folder, draft, other)


@BOTH
def test_what_does_not_belong_together_is_refused(
    export: Export, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    folder = export(draft, vocabulary, tmp_path / "draft")
    with pytest.raises(ValueError, match="exists and is not replaced"):
        export(draft, vocabulary, folder)
    with pytest.raises(ValueError, match="vocabulary map is 39 of 96 tokens"):
        export(draft, VocabularyMap(vocabulary.d2t[:-1], vocabulary.t2d), tmp_path / "other")
    state = draft.state_dict()
    del state["fc.weight"]
    with pytest.raises(ValueError, match=r"fc.weight absent instead of \(32, 96\)"):
        export_vllm(state, draft.config, vocabulary, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        verify_export(folder, draft, vocabulary)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 1.5, 3.0, 9.0],
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "rope, length, positions",
    [(LONGROPE, 100, 256), (LONGROPE, 1024, 256), (DYNAMIC, 1024, 256), (LINEAR, 1024, 1024)],
)
def test_an_export_turns_by_the_angles_of_the_training(
    rope: dict[str, Any], length: int, positions: int, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    target = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=2 * H, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    trained = DraftModel(build_draft_config(target, DraftSection(vocab_size=VD), length=length))
    folder = vllm(trained, vocabulary, tmp_path / "draft", max_position=1024)
    keys = json.loads((folder / "config.json").read_text())
    assert keys["max_position_embeddings"] == positions
    cpu = torch.device("cpu")
    own, read = rotary_frequencies(trained.config, cpu), rotary_frequencies(draft_config(keys, VD), cpu)
    assert torch.equal(own.frequencies, read.frequencies) and own.factor == read.factor
