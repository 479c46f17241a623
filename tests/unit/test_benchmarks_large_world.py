"""The benchmark of large worlds: figures worked out by hand, and every kind of fault is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from benchmarks import large_resume, large_world
from eagle3_ds.layout import SpanPlan
from eagle3_ds.topology.mesh import Mesh

LENGTH = 32_768


def small_plan(ring: int = 2) -> SpanPlan:
    return SpanPlan.make([LENGTH], ring, 2, live=large_world.supervised(LENGTH))


def test_a_world_of_eight() -> None:
    world = large_world.plan_world(Mesh(2, 2, 2), LENGTH)
    assert world.faults == []
    # 4 of ulysses, 4 of the ring, 2 of a sequence, 4 of draft_dp; a rank is in one of each, and in the world.
    assert (world.groups_made, world.groups_of_a_rank, world.groups_made_for_zero) == (14, 5, 1)
    assert world.slots_of_a_rank == LENGTH // 4
    # Five arrays have an int64 for each slot: live with rest, document, position, ring_slots, sequence_order.
    assert world.plan_bytes == 5 * LENGTH * 8
    assert not dist.is_initialized()


def test_an_axis_of_one_rank_has_no_groups() -> None:
    world = large_world.plan_world(Mesh(1, 1, 8), LENGTH)
    assert world.faults == []
    # The ulysses group is that of the sequence, too.
    assert (world.groups_made, world.groups_of_a_rank) == (1, 2)


def test_a_wrong_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mesh.ring_groups
    monkeypatch.setattr(Mesh, "ring_groups", lambda mesh: [group[::-1] for group in right(mesh)])
    assert large_world.make_groups(Mesh(2, 2, 2), 0).faults == []  # new_group sorts its ranks
    monkeypatch.setattr(Mesh, "ring_groups", Mesh.dp_groups)
    (fault,) = large_world.make_groups(Mesh(2, 2, 2), 1).faults
    assert fault == "rank 1 is in the ring group [1, 5], not in [1, 3]"


def test_a_slot_dealt_twice_is_found() -> None:
    plan = small_plan()
    assert large_world.wrong_deal(plan) == []
    live = plan.live.copy()
    live[0, 0, 0] = live[1, 1, 5]
    assert large_world.wrong_deal(replace(plan, live=live)) == [
        f"slot {plan.live[0, 0, 0]} is dealt to 0 ranks"
    ]


@pytest.mark.parametrize(("function", "name"), [("gathered_tiles", "gathered"), ("block_tiles", "block")])
def test_a_missing_tile_is_found(function: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan()
    assert large_world.make_share(plan, 1)[0].faults == []
    right = getattr(large_world, function)
    monkeypatch.setattr(large_world, function, lambda *place: right(*place)[1:])
    (fault,) = large_world.make_share(plan, 1)[0].faults
    assert fault.startswith(f"the {name} tiles of ring rank 0 have ")


def test_messages_that_do_not_fit_are_found() -> None:
    exchanges = [large_world.make_share(small_plan(), sp_rank)[1] for sp_rank in (0, 3)]
    assert large_world.wrong_messages([0, 3], exchanges) == []
    sent = exchanges[0].send_sizes[3]
    exchanges[0].send_sizes[3] += 1
    assert large_world.wrong_messages([0, 3], exchanges) == [
        f"sp rank 0 sends {sent + 1} rows to 3, which awaits {sent}"
    ]


def test_the_result_is_written_and_a_fault_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large_world, "WORLDS", (Mesh(2, 2, 1),))
    assert large_world.main(["--folder", str(tmp_path)]) == 0
    (world,) = json.loads((tmp_path / "large_world.json").read_text())["worlds"]
    assert world["mesh"] == {"draft_dp": 2, "ring": 2, "ulysses": 1}
    assert all(seconds > 0 for seconds in world["seconds"].values())
    monkeypatch.setattr(large_world, "wrong_deal", lambda plan: ["slot 7 is dealt to 0 ranks"])
    assert large_world.main(["--folder", str(tmp_path)]) == 1
    assert "slot 7 is dealt to 0 ranks" in capsys.readouterr().out


def test_supervised_slots_end_each_turn() -> None:
    live = large_world.supervised(2 * large_world.TURN)
    assert np.flatnonzero(np.diff(live)).tolist() == [3071, 4095, 7167]
    assert live.mean() == 0.25


def test_a_rank_that_resumes_opens_its_share_of_the_files_and_those_of_its_own_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an equal world both are its own file. Elements of others are a fault that is named."""
    resumed = large_resume.resume_world(12, [0, 5, 11])
    assert (resumed.opened, resumed.orders_a_second, resumed.faults) == (2, 24.0, [])
    values = large_resume._values
    monkeypatch.setattr(large_resume, "_wrong", lambda rank, world, read: [f"rank {rank}"])
    assert large_resume.resume_world(3, [1]).faults == ["rank 1"]
    monkeypatch.undo()
    parts = {kind: [values(kind, own) for own in large_resume._own(1, 3)] for kind in large_resume.KINDS}
    assert large_resume._wrong(1, 3, parts) == []
    parts["exp_avg"][4][7] += 1
    assert large_resume._wrong(1, 3, parts) == [
        "rank 1 has read other elements of exp_avg of parameter.4 than were written"
    ]
