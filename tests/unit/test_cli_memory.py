"""Advice after a shortage of memory, and none after anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.run.memory_advice import advise_on_memory
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
