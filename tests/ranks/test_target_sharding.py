"""Targets sharded by ZeRO-3 and cut over ranks, family by family, against each document alone; and what is
not sharded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.config import TargetSection, load_recipe
from eagle3_ds.targets import capture_hidden_states, load_target
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.target_engine import TargetEngine, _load_sharded
from tests.unit.tiny_families import AUX_LAYERS, FAMILIES, family_config, random_model, vision_language_config
from tests.unit.tiny_target import build_tiny_target

pytestmark = pytest.mark.ranks
RANKS = 2
LENGTHS = (13, 5, 24)
VISION_LANGUAGE = "gemma3"
NAMES = [*FAMILIES, VISION_LANGUAGE]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target of each family, by its name."""
    root = tmp_path_factory.mktemp("targets")
    tokenizer = list(build_tiny_target(root / "tiny").glob("tokenizer*"))
    for name in NAMES:
        config = vision_language_config() if name == VISION_LANGUAGE else family_config(name)
        random_model(config).save_pretrained(root / name)
        for file in tokenizer:
            shutil.copy(file, root / name)
    return root


def section(folder: Path) -> TargetSection:
    return TargetSection(path=str(folder), dtype="float32", aux_layers=AUX_LAYERS)


def tokens() -> torch.Tensor:
    return torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def rank_of_engines(root: Path) -> dict[str, tuple[Any, ...]]:
    """Slots, aux and teacher of this rank, by family."""
    topology = maybe_setup_distributed(ulysses=RANKS)
    results = {}
    for name in NAMES:
        target = (f"target.path={root / name}", "target.build=null", f"target.aux_layers={list(AUX_LAYERS)}")
        recipe = load_recipe("recipes/quickstart.yaml", [*target, "parallel.ring=1"])
        states = TargetEngine(recipe, topology).run(tokens(), LENGTHS)
        results[name] = (states.slots, states.aux, states.teacher)
    return results


@pytest.fixture(scope="module")
def found(root: Path, run_ranks: Any) -> list[dict[str, tuple[Any, ...]]]:
    return run_ranks(RANKS, rank_of_engines, root)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_target_computes_what_it_does_for_each_document_alone(
    root: Path, found: Any, name: str
) -> None:
    target = load_target(section(root / name))
    documents = [capture_hidden_states(target, ids) for ids in tokens().split(LENGTHS)]
    for place, parts in enumerate(zip(*documents, strict=True), 1):
        expected = torch.cat(parts)
        for result in (by_name[name] for by_name in found):
            own = torch.from_numpy(result[0][result[0] < len(expected)])
            assert (result[place][: len(own)] - expected[own]).norm() <= 1e-5 * expected[own].norm()


def rank_of_loading(folder: Path) -> tuple[set[str], set[str]]:
    """The model's parameters that are not partitioned, and those that this rank holds whole."""
    model = _load_sharded(section(folder), maybe_setup_distributed(ulysses=RANKS)).model
    unsharded = {name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")}
    return unsharded, {
        name for name, parameter in model.named_parameters() if not parameter.is_meta and parameter.numel()
    }


def test_a_vision_tower_is_neither_partitioned_nor_sent(root: Path, run_ranks: Any) -> None:
    (unsharded, whole), (same, nothing) = run_ranks(RANKS, rank_of_loading, root / VISION_LANGUAGE)
    assert unsharded == same == whole, (
        "rank 0, which read them, holds them until they are dropped with the model"
    )
    assert unsharded and all("vision" in name or "multi_modal" in name for name in unsharded)
    assert not nothing
