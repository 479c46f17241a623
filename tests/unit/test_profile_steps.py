"""What a profile counts, and what the recipe refuses to profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from eagle3_ds.config import load_recipe
from eagle3_ds.layout import PackedSequence
from eagle3_ds.parts import ATTENTION, LOSS, PREFIX, marked
from eagle3_ds.plan import attention_pairs, step_flops
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.train.profile import (
    OTHER,
    STEP,
    attention_flops,
    by_part,
    check_profile,
    lines,
    product_flops,
    table,
)

BASE = "recipes/quickstart.yaml"


@marked(LOSS)
def inner(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@marked(ATTENTION)
def outer(x: torch.Tensor) -> torch.Tensor:
    return inner(x) + x[:, :8] @ x[:8]


def test_a_part_within_another_is_not_counted_in_it() -> None:
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        outer(x)
        with record_function(f"{STEP}1"):
            outer(x)
            x.add(1).addmm_(x, x)
    seconds, flops = by_part(found.events(), of_device=False)
    assert set(seconds) == {ATTENTION, LOSS, OTHER}, "what is outside of the steps is not counted"
    assert (flops[LOSS], flops[ATTENTION], flops[OTHER]) == (2 * 64**3, 2 * 64 * 8 * 64, 2 * 64**3)
    whole = next(event.cpu_time_total for event in found.events() if event.name == f"{STEP}1")
    assert sum(seconds.values()) == pytest.approx(whole / 1e6, rel=1e-3)


def test_nothing_is_marked_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []

    class Mark(record_function):
        def __init__(self, name: str) -> None:
            marks.append(name)
            super().__init__(name)

    monkeypatch.setattr("eagle3_ds.parts.record_function", Mark)
    outer(torch.ones(64, 64))
    assert marks == []
    with profile(activities=[ProfilerActivity.CPU]):
        outer(torch.ones(64, 64))
    assert marks == [PREFIX + ATTENTION, PREFIX + LOSS]


def test_products_are_counted_by_their_shapes() -> None:
    assert product_flops("aten::mm", [[3, 5], [5, 7]]) == 2 * 3 * 5 * 7
    assert product_flops("aten::bmm", [[2, 3, 5], [2, 5, 7]]) == 2 * 2 * 3 * 5 * 7
    assert product_flops("aten::addmm", [[7], [3, 5], [5, 7], [], []]) == 2 * 3 * 5 * 7
    assert product_flops("aten::mul", [[3, 5], [3, 5]]) == 0


def test_the_table_says_shares_and_rates() -> None:
    parts = table(Counter({"a": 3.0, "b": 1.0}), Counter({"a": 6 * 10**12}), 4e12)
    assert (parts["a"].share, parts["a"].of_matmul, parts["b"].of_matmul) == (0.75, 0.5, None)
    told = list(lines(parts, 2, 4e12))
    assert told[2].split() == ["a", "1.5000", "75.0%", "3", "50%"] and told[3].split() == [
        "b",
        "0.5000",
        "25.0%",
    ]


@pytest.mark.parametrize("name", ["quickstart", "quickstart_peagle", "quickstart_dflash"])
def test_the_attention_of_a_full_pack_is_what_the_planner_counts(name: str, tmp_path: Path) -> None:
    mesh = [f"parallel.{axis}=1" for axis in ("ring", "ulysses", "draft_dp")]
    recipe = load_recipe(f"recipes/{name}.yaml", [*mesh, f"target.path={tmp_path / 'none'}"])
    setup = plan_recipe(recipe, Machines(gpus=1)).setup
    rows, every = torch.zeros(setup.length, 1), torch.ones(setup.length, dtype=torch.bool)
    pack = PackedSequence(rows[:, 0].long(), every, (setup.length,), rows[:, 0].long(), rows, rows)
    place = SimpleNamespace(place=SimpleNamespace(ring_rank=0))
    trainer: Any = SimpleNamespace(recipe=recipe, setup=setup, topology=place)
    planned = step_flops(setup, attention_pairs(setup))
    expected = planned.attention_forward + planned.attention_backward
    assert attention_flops(trainer, [[pack], [pack]]) == 2 * expected > 0


@pytest.mark.parametrize("steps", ["[3, 2]", "[1, 301]", "[0, 2]", "[1]"])
def test_steps_that_the_run_has_not_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match="profile_steps"):
        load_recipe(BASE, [f"train.profile_steps={steps}"])


def test_steps_beyond_the_epochs_are_refused_and_those_done_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = load_recipe(BASE, ["train.profile_steps=[10, 12]"])
    with pytest.raises(ValueError, match=r"profile_steps is \[10, 12\], and the run has 11 steps"):
        check_profile(recipe, 0, 11)
    check_profile(recipe, 9, 300)
    assert not caplog.text
    check_profile(recipe, 11, 300)
    assert "steps 10 to 11 were taken before this resume" in caplog.text
