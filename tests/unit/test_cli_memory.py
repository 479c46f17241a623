"""Advice after a shortage of memory, and none after anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.config.deepspeed_keys import MONITORS
from eagle3_ds.costs import Setup
from eagle3_ds.run import memory_advice
from eagle3_ds.run.memory_advice import advise_on_memory, deepspeed_files
from eagle3_ds.targets import build_target

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("target")
    small = ("hidden_size=32", "intermediate_size=64", "num_layers=7", "vocab_size=300", "steps=0")
    overrides = [
        f"target.path={folder / 'model'}",
        *(f"target.build.{value}" for value in small),
        "draft.vocab_size=256",
    ]
    recipe = load_recipe(
        ROOT / "recipes/quickstart.yaml", [*overrides, f"deepspeed={ROOT / 'ds_configs/zero2.json'}"]
    )
    build_target(recipe.target, "def f(x):\n    return x\n" * 400, [])
    return recipe


@pytest.mark.parametrize(
    "reason",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
            "1073741824 bytes."
        ),
        "MemoryError",
        "signal 9 (SIGKILL): by hand, by the scheduler, or by the kernel because the host's memory was full",
    ],
)
def test_a_shortage_is_followed_by_what_would_help(reason: str, recipe: Recipe) -> None:
    advice = advise_on_memory(reason, recipe, 4)
    assert advice is not None
    head, _, changes = advice.partition("What would help most, each alone:\n")
    assert "per rank are needed at the peak" in head and "GiB" in head
    assert len(changes.splitlines()) == 3 and all(
        "=" in line and "saves" in line for line in changes.splitlines()
    )
    assert advice.startswith("If memory was the reason") == ("SIGKILL" in reason)


def test_other_errors_have_no_such_advice(recipe: Recipe) -> None:
    assert advise_on_memory("ValueError: a bad row", recipe, 4) is None


def test_a_target_on_the_devices_is_counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Setup] = []

    def explain(setup: Setup, *more: object) -> str:
        counted.append(setup)
        return ""

    monkeypatch.setattr(memory_advice, "explain_shortage", explain)
    online = recipe.data.model_copy(update={"hidden_states": "online"})
    during = recipe.eval.model_copy(update={"during": 10})
    for changes in ({}, {"data": online}, {"eval": during}):
        advise_on_memory("MemoryError", recipe.model_copy(update=changes), 4)
    alone, beside, decoding = counted
    assert alone.target_bytes == alone.decoder_bytes == 0
    assert beside.target_bytes > 0 and decoding.decoder_bytes == beside.target_bytes
    assert decoding.decoder_draft_bytes > 0


STRANGERS = {
    "tsconfig.json": '{"compilerOptions": {}}',
    "broken.json": "{",
    "list.json": "[1]",
    "empty.json": "{}",
    "bool.json": '{"zero_optimization": true}',
    "text_stage.json": '{"zero_optimization": {"stage": "2"}}',
    "auto.json": '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}',
    "hf.json": '{"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}',
    "nvme.json": '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}',
    "hpz.json": '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}',
    "monitor.json": '{"zero_optimization": {"stage": 2}, "wandb": {"enabled": true}}',
    "old.json": '{"zero_optimization": {"stage": 2, "cpu_offload": true}}',
}


def test_strangers_files_beside_the_recipes_are_passed_over(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MONITORS, "wandb", "a_package_that_is_not_installed")
    for name, text in STRANGERS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "folder.json").mkdir()
    for name, stage in (("own", 2), ("ours", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    moved = recipe.model_copy(update={"deepspeed": str(tmp_path / "own.json")})
    files, notes = deepspeed_files(moved, 4)
    assert [Path(file).name for file in files] == ["own.json", "ours.json"]
    passed = [Path(note.removeprefix("passed over ").partition(": ")[0]).name for note in notes]
    assert passed == sorted([*STRANGERS, "latin.json", "folder.json"])
    assert all("\n" not in note for note in notes)
    advice = advise_on_memory("MemoryError", moved, 4)
    assert advice is not None and advice.count("note: passed over") == len(notes)


def test_the_recipes_own_file_is_not_passed_over(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "own.json").write_text(STRANGERS["bool.json"])
    with pytest.raises(ValueError, match="`zero_optimization` is true: it must be a JSON object"):
        deepspeed_files(recipe.model_copy(update={"deepspeed": str(tmp_path / "own.json")}), 4)
