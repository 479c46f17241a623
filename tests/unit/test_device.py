"""The device room: which accelerator, which device of it, which process group; and that no other room names a
vendor.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eagle3_ds.device import runtime
from eagle3_ds.device.found import (
    built_with,
    described_devices,
    detect_accelerator,
    device_count,
    device_index,
    device_memory,
    device_name,
    take_device,
)
from eagle3_ds.device.kinds import KINDS, VISIBLE, backend_of, casts_float8, forced_kind, runs_triton
from eagle3_ds.device.world import join_world

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class FakeModule:
    """torch's module of a vendor with `count` devices, of which one is current."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current: int | None = None

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.current = index

    def get_device_name(self, index: int) -> str:
        return f"Device {index}"

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name=f"Device {index}", major=9, minor=0, total_memory=(64 + index) * 2**30)


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """A torch that has found four XPUs and no CUDA device."""
    module = FakeModule(4)
    monkeypatch.setattr(torch, "xpu", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return module


def test_backends_and_variables_by_kind() -> None:
    assert {kind: backend_of(kind) for kind in KINDS} == {
        "cpu": "gloo",
        "cuda": "nccl",
        "npu": "hccl",
        "xpu": "xccl",
    }
    assert (VISIBLE["npu"], VISIBLE["xpu"]) == ("ASCEND_RT_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
    assert "cpu" not in VISIBLE
    # torch's own table, where it has the kind.
    known = dist.Backend.default_device_backend_map
    assert {kind: backend_of(kind) for kind in KINDS if kind in known} == {
        kind: backend for kind, backend in known.items() if kind in KINDS
    }


def test_kinds_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        assert forced_kind({"DS_ACCELERATOR": kind}) == kind
    assert forced_kind({}) is forced_kind({"DS_ACCELERATOR": ""}) is None
    for refused in ("abacus", "hpu"):
        with pytest.raises(ValueError, match=f"'{refused}', but only cpu, cuda, npu, xpu are.*Unset it"):
            forced_kind({"DS_ACCELERATOR": refused})
    with pytest.raises(ValueError, match="'mps' .torch has no process groups"):
        forced_kind({"DS_ACCELERATOR": "mps"})
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert detect_accelerator() == "xpu"


def test_what_torch_finds(xpu: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_accelerator() == "xpu"
    assert (device_count("xpu"), device_name("xpu"), device_memory("xpu")) == (4, "Device 0", 64 * 2**30)
    assert described_devices("xpu")[1] == ("xpu:1", "Device 1", "65 GiB")
    xpu.count = 0
    assert detect_accelerator() == "cpu"
    assert device_count("cpu") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert detect_accelerator() == "cuda"


def test_a_kind_that_this_torch_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    with pytest.raises(ValueError, match="DS_ACCELERATOR is 'npu'.*Install torch_npu, or unset it"):
        detect_accelerator()


def test_versions_name_the_vendors_library() -> None:
    rows = dict(built_with())
    assert set(rows) >= {"CUDA of torch", "cuDNN of torch"}
    if torch.version.cuda is None:
        assert rows["CUDA of torch"] == "none: this torch is built without CUDA"


@pytest.mark.parametrize(
    ("count", "environ", "index"),
    [
        (4, {"LOCAL_RANK": "3"}, 3),
        (4, {}, 0),
        # A scheduler that shows each rank its own device alone.
        (1, {"LOCAL_RANK": "3"}, 0),
        (1, {"LOCAL_RANK": "0"}, 0),
    ],
)
def test_the_device_of_a_rank(count: int, environ: dict[str, str], index: int) -> None:
    assert device_index("npu", count, environ) == index


@pytest.mark.parametrize("count", [0, 2])
def test_a_rank_without_a_device(count: int) -> None:
    environ = {"LOCAL_RANK": "3", "ASCEND_RT_VISIBLE_DEVICES": "4,5"}
    with pytest.raises(ValueError, match=f"LOCAL_RANK is 3.*{count} npu.*DEVICES is '4,5'.*fewer ranks"):
        device_index("npu", count, environ)


def test_deepspeed_is_told_the_index(xpu: FakeModule) -> None:
    environ = {"LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    assert take_device("xpu", environ) == torch.device("xpu", 2) and xpu.current == 2
    assert environ == {"LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    xpu.count = 1
    assert take_device("xpu", environ) == torch.device("xpu", 0) and xpu.current == 0
    assert environ == {"LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    alone: dict[str, str] = {}
    take_device("xpu", alone)
    assert alone == {}, "a variable that was not there says nothing wrong"
    ranks = {"LOCAL_RANK": "2"}
    assert take_device("cpu", ranks) == CPU and ranks == {"LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("device", "backend", "world_size", "joined"),
    [
        ("cpu", None, "4", ("gloo", {})),
        ("cuda:1", None, "4", ("nccl", {"device_id": torch.device("cuda:1")})),
        ("cuda:1", "gloo", "4", ("gloo", {})),
        ("cuda:0", None, "1", ("nccl", {})),
        ("xpu:1", None, "4", ("xccl", {})),
    ],
)
def test_a_group_is_bound_where_that_makes_its_communicator(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str | None, world_size: str, joined: Any
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: calls.append((name, options)))
    monkeypatch.setenv("WORLD_SIZE", world_size)
    join_world(torch.device(device), backend)
    assert calls == [joined]


def test_a_cpu_waits_for_nothing() -> None:
    runtime.synchronize(CPU)
    runtime.release_cached_memory(CPU)
    assert runtime.profiler_activity(CPU) is None


def test_what_one_kind_alone_can() -> None:
    assert [kind for kind in (*KINDS, "meta") if runs_triton(kind)] == ["cuda"]
    assert [kind for kind in (*KINDS, "meta") if casts_float8(kind)] == ["cpu", "cuda"]
    assert not any(runtime.adds_in_product(kind) for kind in (*KINDS, "meta") if kind != "cuda")
    assert runtime.adds_in_product("cuda") is (torch.version.hip is None)


VENDOR_NAMES = {"cuda", "is_cuda", "hip", "cudnn", "npu", "is_npu", "xpu", "is_xpu", "mps", "nccl", "hccl"}
ALLOWED = {
    # Names of kernels in a recipe, not devices.
    "config/schema.py": {"cuda", "cudnn", "npu"},
}


def vendor_names(source: str) -> set[str]:
    """Vendors' kinds, and attributes named after them, that a source uses: `torch.cuda`, `x.is_cuda`,
    `"cuda"`, `"cuda:0"`, or DeepSpeed's accelerator. Words in docstrings and messages are no use.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in VENDOR_NAMES:
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value.partition(":")[0]} & VENDOR_NAMES
        elif isinstance(node, ast.ImportFrom | ast.Import):
            text = ast.unparse(node)
            found |= {"deepspeed.accelerator"} if "deepspeed.accelerator" in text else set()
            found |= {name for name in VENDOR_NAMES if f"torch.{name}" in text}
    return found


def test_no_other_room_names_a_vendor() -> None:
    allowed = dict(ALLOWED)
    for path in sorted((ROOT / "eagle3_ds").glob("**/*.py")):
        name = path.relative_to(ROOT / "eagle3_ds").as_posix()
        if name.split("/")[0] in ("kernels", "device"):
            continue
        assert vendor_names(path.read_text(encoding="utf-8")) == allowed.pop(name, set()), name
    assert not allowed, "an exception that is not needed any more"


def test_no_measurement_names_a_vendor() -> None:
    # Of the step that is counted without a device: the name of the kernel that is counted.
    allowed = {"device_step.py": {"cuda"}}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        assert vendor_names(path.read_text(encoding="utf-8")) == allowed.get(path.name, set()), path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("torch.cuda.synchronize()", {"cuda"}),
        ("x.is_cuda", {"is_cuda"}),
        ("f(device='cuda:1')", {"cuda"}),
        ("torch.version.hip", {"hip"}),
        ("from torch.cuda import Stream", {"cuda"}),
        ("from deepspeed.accelerator import get_accelerator", {"deepspeed.accelerator"}),
        ("'On CUDA the cuda kernel runs'", set()),
    ],
)
def test_the_search_can_fail(source: str, names: set[str]) -> None:
    assert vendor_names(source) == names


def test_the_launcher_needs_no_torch_for_names() -> None:
    for name in ("__init__.py", "kinds.py"):
        tree = ast.parse((ROOT / "eagle3_ds" / "device" / name).read_text(encoding="utf-8"))
        imported = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
        assert not [line for line in imported if "torch" in line]
