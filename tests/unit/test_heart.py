"""What a rank tells its supervisor, word by word."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from eagle3_ds.guard import heart
from eagle3_ds.guard.heart import beating, last_collective
from eagle3_ds.launch.logs import Status


@pytest.fixture
def pipe() -> tuple[int, int]:
    """Read end and write end; `beating` closes the second."""
    return os.pipe()


def told(reading: int) -> list[dict[str, Any]]:
    with os.fdopen(reading) as stream:
        return [json.loads(line) for line in stream]


def test_a_heart_beats_and_tells_its_place(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heart, "BEAT_SECONDS", 0.01)
    reading, writing = pipe
    with beating(writing) as own:
        own.at("training", 3)
        time.sleep(0.1)
    statuses = [Status(**message) for message in told(reading)]
    assert len(statuses) > 3
    assert {(status.phase, status.step) for status in statuses[-2:]} == {("training", 3)}


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (ValueError("a bad row"), False),
        (dist.DistBackendError("NCCL error in: work.cpp"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:532] Connection closed by peer [127.0.0.1]:4711"), True),
    ],
)
def test_the_exception_is_told_and_raised_on(error: Exception, follows: bool, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(type(error)), beating(writing):
        raise error
    *_, last = told(reading)
    assert last["error"]["reason"].endswith(str(error)) and last["error"]["follows"] == follows
    assert "Traceback" in last["error"]["traceback"] and "raise error" in last["error"]["traceback"]


def test_leaving_well_is_no_error(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(SystemExit), beating(writing):
        raise SystemExit(0)
    assert not [message for message in told(reading) if "error" in message]


def test_without_a_supervisor_nothing_is_written() -> None:
    with pytest.raises(ValueError, match="a bad row"), beating(None) as own:
        own.at("training", 1)
        raise ValueError("a bad row")


def test_a_rank_leaves_with_its_supervisor(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    reading, writing = pipe
    with beating(writing) as own:
        os.close(reading)
        own.at("training", 1)
    assert left and set(left) == {1}


def test_the_collective_that_is_waited_for_comes_before_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, created: int, retired: bool, **more: Any) -> dict[str, Any]:
        return {
            "profiling_name": name, "time_created_ns": created, "retired": retired,
            "collective_seq_id": created, "p2p_seq_id": 9, "is_p2p": False,
            "process_group": ["0", "default_pg"], "input_sizes": [[4, 2], []], **more,
        }  # fmt: skip

    records: dict[str, list[dict[str, Any]]] = {"_dump_fr_trace_json": [], "_dump_nccl_trace_json": []}
    for name in records:
        monkeypatch.setattr(
            heart._distributed_c10d,
            name,
            lambda name=name: json.dumps({"entries": records[name]}).encode(),
            raising=False,
        )
    assert last_collective() == ("", False, 0)
    records["_dump_fr_trace_json"] = [entry("gloo:all_reduce", 1, True), entry("gloo:broadcast", 3, True)]
    assert last_collective() == ("gloo:broadcast number 3 of group 0 on 4x2 scalar", False, 3)
    records["_dump_nccl_trace_json"] = [entry("nccl:send", 2, False, is_p2p=True, input_sizes=[])]
    assert last_collective() == ("nccl:send number 9 of group 0 on nothing", True, 2)
    # A batch of both: its parts are never retired, it is.
    batch = [entry(f"nccl:{name}", at, False, is_p2p=True) for at, name in ((2, "send"), (4, "recv"))]
    whole = entry("nccl:coalesced", 5, True, is_p2p=True, input_sizes=[])
    records["_dump_nccl_trace_json"] = [*batch, whole]
    assert last_collective() == ("nccl:coalesced number 9 of group 0 on nothing", False, 5)
    records["_dump_nccl_trace_json"] = [*batch, {**whole, "retired": False}]
    assert last_collective() == ("nccl:coalesced number 9 of group 0 on nothing", True, 5)
    # Of another group, or alone, they are waited for.
    elsewhere = {**whole, "process_group": ["7", "ring"]}
    records["_dump_nccl_trace_json"] = [*batch, elsewhere]
    assert last_collective() == ("nccl:send number 9 of group 0 on 4x2 scalar", True, 2)
