"""Sharding a target over ranks: what of a vision-language model a job holds, and that its language model is unchanged by it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import AUX_LAYERS, random_model, vision_language_config
from tiny_target import build_tiny_target

from eagle3_ds.config import TargetSection, load_recipe
from eagle3_ds.target import capture_hidden_states, load_target
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.target_engine import TargetEngine, _load_sharded

pytestmark = pytest.mark.dist
RANKS = 2
LENGTHS = (13, 5, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("target")
    random_model(vision_language_config()).save_pretrained(root / "both")
    for file in build_tiny_target(root / "tiny").glob("tokenizer*"):
        shutil.copy(file, root / "both")
    return root / "both"


def section(folder: Path) -> TargetSection:
    return TargetSection(path=str(folder), dtype="float32", aux_layers=AUX_LAYERS)


def tokens() -> torch.Tensor:
    return torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def rank_of_target(folder: Path) -> tuple[dict[str, bool], list[str], tuple[Any, ...]]:
    """Whether each parameter of the model is partitioned, those with memory of their own here, and slots, aux and teacher."""
    topology = maybe_setup_distributed(ulysses=RANKS)
    model = _load_sharded(section(folder), topology).model
    partitioned = {name: hasattr(parameter, "ds_id") for name, parameter in model.named_parameters()}
    whole = [name for name, parameter in model.named_parameters() if not parameter.is_meta and parameter.numel()]
    layers = ",".join(map(str, AUX_LAYERS))
    overrides = (f"target.path={folder}", "target.build=null", f"target.aux_layers=[{layers}]", "parallel.ring=1")
    engine = TargetEngine(load_recipe("recipes/quickstart.yaml", overrides), topology)
    states = engine.run(tokens(), LENGTHS)
    return partitioned, whole, (states.slots, states.aux, states.teacher)


def test_the_vision_tower_is_neither_partitioned_nor_held(folder: Path, run_ranks: Any) -> None:
    results = run_ranks(RANKS, rank_of_target, folder)
    for partitioned, whole, _ in results:
        unused = {name for name, sharded in partitioned.items() if not sharded}
        assert unused and all("vision" in name or "multi_modal" in name for name in unused)
        assert set(whole) <= unused
    assert not results[1][1], "a rank that reads no weights holds some that are never used"
    target = load_target(section(folder))
    documents = [capture_hidden_states(target, ids) for ids in tokens().split(LENGTHS)]
    for place, parts in enumerate(zip(*documents, strict=True), 1):
        expected = torch.cat(parts)
        for _, _, found in results:
            own = torch.from_numpy(found[0][found[0] < len(expected)])
            assert (found[place][: len(own)] - expected[own]).norm() <= 1e-5 * expected[own].norm()
