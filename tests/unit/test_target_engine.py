"""The target engine on one rank: what it computes, its probe, its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.config import load_recipe
from eagle3_ds.targets import capture_hidden_states, load_target, packed, teacher_tokens
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.online import OnlineStates
from eagle3_ds.train.target_engine import TargetEngine
from tests.unit.tiny_target import build_tiny_target

LENGTHS = (13, 5, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


def engine(folder: Path, **changes: str) -> TargetEngine:
    overrides = [f"target.path={folder}", "target.build=null", "parallel.ring=1", "parallel.ulysses=1"]
    recipe = load_recipe(
        "recipes/quickstart.yaml", [*overrides, *(f"{key}={value}" for key, value in changes.items())]
    )
    return TargetEngine(recipe, maybe_setup_distributed())


def tokens() -> torch.Tensor:
    return torch.randint(300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def test_online_states_are_those_of_each_document(folder: Path) -> None:
    target_engine = engine(folder)
    target = load_target(target_engine.recipe.target)
    documents = [capture_hidden_states(target, ids) for ids in tokens().split(LENGTHS)]
    aux, teacher = (torch.cat(parts) for parts in zip(*documents, strict=True))
    states = OnlineStates(target_engine).states
    all_tokens = torch.ones(len(tokens()), dtype=torch.bool)
    token, found_aux, found_teacher = states([7, 8, 9], tokens(), all_tokens, LENGTHS)
    assert (found_aux[0 : len(aux)] - aux).norm() <= 1e-5 * aux.norm()
    # Nobody reads the teacher of the first slot.
    assert (found_teacher[1 : len(teacher)] - teacher[1:]).norm() <= 1e-5 * teacher.norm()
    assert torch.equal(token, teacher_tokens(teacher, target.head))
    # Where only the last document's end is supervised, its teacher alone is there.
    token, found_aux, found_teacher = states([7, 8, 9], tokens(), torch.arange(len(tokens())) >= 36, LENGTHS)
    assert (found_aux[0 : len(aux)] - aux).norm() <= 1e-5 * aux.norm()
    assert (found_teacher[34 : len(teacher)] - teacher[34:]).norm() <= 1e-5 * teacher.norm()
    assert torch.equal(token, teacher_tokens(teacher, target.head))
    with pytest.raises(AssertionError, match="not all on this rank"):
        found_teacher[2:5]


def test_a_target_that_runs_otherwise_over_spans_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packed.packed_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **{**kwargs, "scaling": 0.5 * kwargs["scaling"]})

    monkeypatch.setattr(packed, "packed_attention", wrong)
    with pytest.raises(
        ValueError, match=r"differ from those of its plain forward by .* target.capture: single"
    ):
        engine(folder)


def test_a_target_that_cannot_be_cut_is_refused_before_it_is_loaded(folder: Path) -> None:
    with pytest.raises(ValueError, match="parallel.ulysses is 3, which does not divide the 4 query heads"):
        engine(folder, **{"parallel.ulysses": "3"})
