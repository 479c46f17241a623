"""docs/families.md against what its command makes of a handful of families, and the list of architectures
that vLLM serves drafts for against how it is read."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PhiConfig

from eagle3_ds.targets import AuxCapture, no_known_server
from eagle3_ds.targets.servers_data import VLLM_ARCHITECTURES, VLLM_VERSION
from judge import families, vllm_families
from judge.family_configs import tiny_config

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
# Each way to be right and to be refused, a factor, latent attention, a cap, and a text part.
HANDFUL = ("llama", "gpt_oss", "gemma3", "granite", "deepseek_v3", "lfm2", "gemma2", "gpt2", "bart", "emu3")


def rows() -> dict[str, str]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {found[1]: line for line in lines if (found := re.match(r"\| `([^`]+)` \|", line))}


@pytest.mark.parametrize("family", HANDFUL)
def test_the_table_says_what_the_command_finds(family: str) -> None:
    assert families.judge(family).row() == rows()[family]


def test_the_table_has_every_family_and_nothing_is_wrong() -> None:
    found = rows()
    if f"transformers {version('transformers')}," in TABLE.read_text(encoding="utf-8"):
        assert sorted(found) == families.families()
    single, ranks = (Counter(row.split(" | ")[place] for row in found.values()) for place in (1, 2))
    assert single[families.WRONG] == ranks[families.WRONG] == 0
    assert single[families.RIGHT] >= 60 and ranks[families.RIGHT] >= 60


def test_a_wrong_capture_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the neighbouring layer, as a capture by outputs would have them."""
    hook = AuxCapture.__init__

    def shifted(self: AuxCapture, model: torch.nn.Module, layers: Any) -> None:
        hook(self, model, [layer + 1 for layer in layers] if len(layers) > 1 else layers)

    monkeypatch.setattr(AuxCapture, "__init__", shifted)
    verdict = families.judge("llama")
    assert verdict.single == families.WRONG and "aux rows" in verdict.single_reason


def test_a_wrong_packed_forward_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that see each other, which is what a plan of one document says."""
    monkeypatch.setattr(families.SpanPlan, "make", staticmethod(_one_document))
    verdict = families.judge("llama")
    assert verdict.single == families.RIGHT and verdict.ranks == families.WRONG


MAKE = families.SpanPlan.make


def _one_document(lengths: Any, *others: Any) -> Any:
    return MAKE((sum(lengths),), *others)


def test_a_random_model_has_nothing_neutral() -> None:
    model = families.random_model(tiny_config("llama"))
    assert all(float(weight.std()) > 0.05 for weight in model.parameters())


def test_targets_without_a_known_server_are_told() -> None:
    assert no_known_server(LlamaConfig()) is None
    assert no_known_server(LlamaConfig(architectures=["Qwen3ForCausalLM"])) is None
    told = no_known_server(PhiConfig())
    assert told and f"PhiForCausalLM: vLLM {VLLM_VERSION}" in told
    assert {"LlamaForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"} <= VLLM_ARCHITECTURES


def test_architectures_are_read_from_a_package_s_source(tmp_path: Path) -> None:
    """By inheritance, at a distance and from another file."""
    models = tmp_path / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "a.py").write_text("class A(nn.Module, SupportsEagle3): ...\n")
    (models / "b.py").write_text("class B(a.A): ...\nclass C(nn.Module): ...\n")
    (models / "registry.py").write_text(
        '_TEXT_GENERATION_MODELS = {"AForCausalLM": ("a", "A"), "CForCausalLM": ("b", "C")}\n'
        '_MULTIMODAL_MODELS = {"BForConditionalGeneration": ("b", "B")}\n'
        '_EMBEDDING_MODELS = {"AModel": ("a", "A")}\n'
    )
    assert vllm_families.served_architectures(tmp_path / "vllm") == [
        "AForCausalLM",
        "BForConditionalGeneration",
    ]
    (models / "a.py").write_text("class A(nn.Module): ...\n")
    with pytest.raises(ValueError, match="vLLM has renamed it"):
        vllm_families.served_architectures(tmp_path / "vllm")
    with pytest.raises(ValueError, match="site-packages/vllm"):
        vllm_families.served_architectures(tmp_path)
