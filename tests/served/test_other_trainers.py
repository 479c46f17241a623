"""The real speculators 0.9 and SpecForge 0.2 load what is exported, every tensor equal to ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.served.judged import PEAGLE, VARIANTS, Bench

READER = Path(__file__).with_name("read_by_others.py")
Loaded = dict[tuple[str, str, str], dict[str, Tensor]]
# SpecForge's model is the plain draft of one layer, without norms of EAGLE-3.1. Of YaRN as gpt-oss has it, it
# refuses that no mscale is named.
TO_SPECFORGE = [("llama", "plain"), ("llama", "other layers"), ("qwen3", "plain")]
EMBEDDING = "embed_tokens.weight"


@pytest.fixture(scope="module")
def loaded(bench: Bench, run_there: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tensors of each export as a package has them, loaded by one process."""
    folder = tmp_path_factory.mktemp("loaded")
    wanted = [("speculators", *key) for key in VARIANTS] + [("specforge", *key) for key in TO_SPECFORGE]
    words: list[object] = []
    for package, target, draft in wanted:
        pair = bench.pairs(target)[draft]
        export = pair.speculators if package == "speculators" else pair.vllm
        words += [package, export, folder / f"{package} {target} {draft}"]
    run_there(READER, *words)
    return {key: load_file(folder / " ".join(key)) for key in wanted}


@pytest.mark.parametrize(("target", "draft"), VARIANTS, ids=map(", ".join, VARIANTS))
def test_speculators_has_our_tensors(target: str, draft: str, loaded: Loaded, bench: Bench) -> None:
    pair, theirs = bench.pairs(target)[draft], loaded["speculators", target, draft]
    ours = {**pair.draft, EMBEDDING: pair.embedding.clone(), **pair.vocabulary.exported()}
    if "mask_embedding" in ours:  # They have it as the mask token's row.
        ours[EMBEDDING][PEAGLE["mask_token_id"]] = ours.pop("mask_embedding")
    assert ours.keys() <= theirs.keys()
    # The others are the target's, which its training reads.
    assert theirs.keys() - ours.keys() <= {"verifier_lm_head.weight", "verifier_norm.weight"}
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize(("target", "draft"), TO_SPECFORGE, ids=map(", ".join, TO_SPECFORGE))
def test_specforge_has_our_tensors(target: str, draft: str, loaded: Loaded, bench: Bench) -> None:
    pair, theirs = bench.pairs(target)[draft], loaded["specforge", target, draft]
    ours = load_file(pair.vllm / "model.safetensors")
    assert theirs.keys() - ours.keys() == {EMBEDDING}, "it takes the embedding from the target"
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
