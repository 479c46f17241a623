"""A DeepSpeed JSON is judged by DeepSpeed itself before a process starts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from eagle3_ds.config import load_recipe
from eagle3_ds.config.deepspeed_keys import MONITORS
from eagle3_ds.run.checks import check_deepspeed
from eagle3_ds.topology import Mesh

ROOT = Path(__file__).parents[2]
MESH = Mesh.from_world(4, ring=2, ulysses=2, draft_dp=1)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def judged(folder: Path, config: object, *overrides: str) -> str:
    """What is said about a JSON beside the quickstart's recipe; empty when it passes."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    recipe = load_recipe("recipes/quickstart.yaml", [f"deepspeed={path}", *overrides])
    try:
        check_deepspeed(recipe, MESH)
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
        return str(error)
    return ""


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_taken(path: Path, tmp_path: Path) -> None:
    assert judged(tmp_path, json.loads(path.read_text())) == ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
            "`zero_optimization.reduce_bucket_size`: DeepSpeed refuses 0: Input should be greater than 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"classs": []}}},
            "`zero_optimization.leaf_module.classs`: DeepSpeed refuses",
        ),
        (
            {"wandb": {"enabld": True}},
            "`wandb.enabld`: DeepSpeed refuses True: Extra inputs are not permitted",
        ),
        ({"csv_monitor": {"enabled": "perhaps"}}, "`csv_monitor.enabled`: DeepSpeed refuses 'perhaps'"),
        ({"tensorboard": {"job_name": []}}, "`tensorboard.job_name`: DeepSpeed refuses []"),
        ({"comms_logger": {"enabled": [], "verbose": 3}}, "`comms_logger"),
        ({"aio": {"use_gds": True}}, "`aio`: DeepSpeed refuses it: GDS currently only supported for CUDA"),
        ({"timers": {"throughput": {"synchronised": True}}}, "`timers"),
    ],
)
def test_what_deepspeed_refuses_is_named_with_its_key(tmp_path: Path, config: object, words: str) -> None:
    assert words in judged(tmp_path, config)


@pytest.mark.parametrize(("name", "package"), sorted(MONITORS.items()))
def test_a_monitor_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    said = judged(tmp_path, {name: {"enabled": True}})
    assert f"`{name}.enabled` is true, but the package {package} is not installed here" in said
    assert f"pip install {package}" in said
    assert judged(tmp_path, {name: {"enabled": False}}) == ""
    assert judged(tmp_path, {"csv_monitor": {"enabled": True}}) == ""


def test_the_rank_free_batch_is_judged_at_any_accumulation(tmp_path: Path) -> None:
    assert judged(tmp_path, {"zero_optimization": {"stage": 2}}, "train.accumulation=3") == ""


def test_a_refusal_of_the_recipe_names_the_file(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    assert "offload_optimizer.device is nvme" in judged(tmp_path, config)
