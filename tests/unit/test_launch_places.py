"""Ranks start where they were meant to: devices that the environment leaves, hosts that are left, free
ports.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.device.kinds import VISIBLE
from eagle3_ds.launch.command import (
    LaunchOptions,
    plan_launch,
    resolve_hosts,
)
from eagle3_ds.launch.places import visible_devices
from eagle3_ds.launch.probe import free_port, is_free, is_here
from tests.unit.started_command import started

ROOT = Path(__file__).parents[2]
CUDA = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(ROOT)
    return load_recipe("recipes/quickstart.yaml", [f"output_dir={tmp_path / 'run'}"])


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("node-0 slots=2\nnode-1 slots=2\n")
    return str(path)


def world(command: list[str]) -> Any:
    """Hosts and slots that a command of DeepSpeed's starts."""
    (text,) = (word.partition("=")[2] for word in command if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(text))


@pytest.mark.parametrize(
    ("visible", "options", "slots"),
    [
        ("2,3", {}, (2, 3)),
        ("3, 1", {}, (1, 3)),
        ("3,1", {"num_ranks": 1}, (3,)),
        ("2,3", {"num_ranks": 1}, (2,)),
        ("1,2,3", {"include": "localhost:2"}, (2,)),
        ("1,2,3", {"exclude": "localhost:2"}, (1, 3)),
        ("0,1,2,3", {}, (0, 1)),
        ("", {}, (0, 1)),
    ],
)
def test_visible_devices_are_an_inclusion(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    options: dict[str, Any],
    slots: tuple[int, ...],
) -> None:
    monkeypatch.setenv(CUDA, visible)
    said = LaunchOptions(**options)
    hosts = resolve_hosts(said, "cuda", 0, 2)
    assert hosts == {"localhost": slots}
    plan = plan_launch(said, hosts, "cuda", recipe, None, os.environ)
    assert world(started(plan, monkeypatch)) == {"localhost": list(slots)}


@pytest.mark.parametrize(("accelerator", "name"), sorted(VISIBLE.items()))
def test_each_vendors_variable(accelerator: str, name: str) -> None:
    assert resolve_hosts(LaunchOptions(), accelerator, 0, 2, {name: "4,6"}) == {"localhost": (4, 6)}
    others = {other: "4,6" for other in VISIBLE.values() if other != name}
    assert resolve_hosts(LaunchOptions(), accelerator, 0, 2, others) == {"localhost": (0, 1)}
    assert visible_devices("cpu", {name: "4,6"}) is None


@pytest.mark.parametrize(
    ("visible", "options", "words"),
    [
        (
            "2,3",
            {"num_ranks": 3},
            "3 ranks are asked for, but this machine has 2 cuda device.s. that CUDA_VISIBLE",
        ),
        ("2,3", {"include": "localhost:0"}, "localhost has no slot 0; it has 2,3"),
        ("GPU-1f2e", {}, "knows devices by their numbers alone.*torchrun"),
        ("MIG-1,MIG-2", {}, "knows devices by their numbers alone"),
        ("2,2", {}, "names a device twice"),
    ],
)
def test_devices_that_are_hidden_or_no_numbers(visible: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_hosts(LaunchOptions(**options), "cuda", 0, 2, {CUDA: visible})


def test_a_device_that_is_not_there_ends_the_list() -> None:
    with pytest.raises(ValueError, match="2 ranks are asked for, but this machine has 1 cuda"):
        resolve_hosts(LaunchOptions(), "cuda", 1, 2, {CUDA: "2,9"})


def test_torchrun_gets_the_devices_by_the_variable(recipe: Recipe) -> None:
    said = LaunchOptions(launcher="torchrun", include="localhost:2,3")
    hosts = resolve_hosts(said, "cuda", 4, 2, {})
    assert plan_launch(said, hosts, "cuda", recipe, None, {}).environment[CUDA] == "2,3"
    said = LaunchOptions(launcher="torchrun")
    hosts = resolve_hosts(said, "cuda", 2, 2, {CUDA: "GPU-a,GPU-b"})
    assert CUDA not in plan_launch(said, hosts, "cuda", recipe, None, {CUDA: "GPU-a,GPU-b"}).environment


def test_a_hostfile_counts_all_devices_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "here"
    path.write_text("localhost slots=4\n")
    with pytest.raises(ValueError, match="slot 0 is to be used. Choose them by --include localhost:2,3"):
        resolve_hosts(LaunchOptions(hostfile=str(path)), "cuda", 0, 2, {CUDA: "2,3"})
    chosen = LaunchOptions(hostfile=str(path), include="localhost:2,3")
    assert resolve_hosts(chosen, "cuda", 0, 2, {CUDA: "2,3"}) == {"localhost": (2, 3)}


def test_one_machines_devices_are_not_exported(recipe: Recipe, hostfile: str) -> None:
    said = LaunchOptions(hostfile=hostfile)
    environ = {"ASCEND_RT_VISIBLE_DEVICES": "2,3", "ASCEND_HOME": "/a"}
    plan = plan_launch(said, resolve_hosts(said, "cpu", 0, 1), "cpu", recipe, None, environ)
    assert plan.exported is not None
    assert "ASCEND_HOME" in plan.exported and "ASCEND_RT_VISIBLE_DEVICES" not in plan.exported


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({"include": "node-1"}, "node-1"),
        ({"include": "node-1:1"}, "node-1"),
        ({"exclude": "node-0"}, "node-1"),
        ({"num_nodes": 1}, "node-0"),
        ({"num_nodes": 1, "num_ranks": 1}, "node-0"),
        ({"include": "node-1", "launcher": "slurm"}, None),
    ],
)
def test_one_remote_host_left_is_started_there(
    recipe: Recipe, hostfile: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], host: str | None
) -> None:
    said = LaunchOptions(hostfile=hostfile, **options)
    hosts = resolve_hosts(said, "cuda", 0, 1, {})
    plan = plan_launch(said, hosts, "cuda", recipe, None, {})
    command = started(plan, monkeypatch)
    if host is None:
        assert command[0] == "srun" and command[command.index("--nodelist") + 1] == "node-1"
        return
    assert command[0] == "pdsh" and command[command.index("-w") + 1] == host
    assert world(command) == {host: list(hosts[host])}
    assert plan.by_ssh == (host,)


def test_a_hostfile_of_one_remote_host(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one"
    path.write_text("node-9 slots=2\n")
    said = LaunchOptions(hostfile=str(path))
    plan = plan_launch(said, resolve_hosts(said, "cuda", 0, 1, {}), "cuda", recipe, None, {})
    command = started(plan, monkeypatch)
    assert command[:1] == ["pdsh"] and "node-9" in command and "--master_addr=10.0.0.7" in command


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_one_host_that_is_this_machine_needs_no_ssh(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    path = tmp_path / "here"
    path.write_text(f"{host} slots=4\n")
    said = LaunchOptions(hostfile=str(path), include=f"{host}:2,3")
    plan = plan_launch(said, resolve_hosts(said, "cuda", 0, 1, {}), "cuda", recipe, None, {})
    assert (plan.exported, plan.by_ssh) == (None, ())
    command = started(plan, monkeypatch)
    assert "deepspeed.launcher.launch" in command and "--master_addr=127.0.0.1" in command
    assert world(command) == {"localhost": [2, 3]}
    elsewhere = LaunchOptions(hostfile=str(path), master_addr="192.0.2.1")
    with pytest.raises(ValueError, match=r"--master_addr is 192.0.2.1, but all ranks run on .* this machine"):
        plan_launch(elsewhere, plan.hosts, "cuda", recipe, None, {})


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70 + ".b", "node-1"])
def test_other_hosts_are_not_here(host: str) -> None:
    assert not is_here(host)


SPECS = ["h:0@h:1", "h@h:0", "h:1,1@h:0", "k@h:1@k:0", "h:1@k", "k:1@h", "h@k"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", ["include", "exclude"])
def test_what_is_said_about_one_host_adds_up_as_in_deepspeed(tmp_path: Path, spec: str, way: str) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = tmp_path / "hosts"
    path.write_text("h slots=2\nk slots=2\n")
    both = (spec, "") if way == "include" else ("", spec)
    expected = runner.parse_inclusion_exclusion({"h": 2, "k": 2}, *both)
    said = LaunchOptions(hostfile=str(path), **{way: spec})  # type: ignore[arg-type]
    if not expected:
        with pytest.raises(ValueError, match="leaves no slot"):
            resolve_hosts(said, "cpu", 0, 1)
        return
    found = resolve_hosts(said, "cpu", 0, 1)
    assert list(found.items()) == [(host, tuple(slots)) for host, slots in expected.items()]


def test_two_ranks_of_one_host_by_two_parts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "local"
    path.write_text("localhost slots=2\n")
    said = LaunchOptions(hostfile=str(path), include="localhost:0@localhost:1")
    plan = plan_launch(said, resolve_hosts(said, "cpu", 0, 1), "cpu", recipe, None, {})
    assert plan.world_size == 2
    # Of one NUMA node, which is what DeepSpeed counts on a CPU.
    assert world(started(plan, monkeypatch, devices=1)) == {"localhost": [0, 1]}


@pytest.mark.parametrize("launcher", ["slurm", "openmpi", "mpich", "impi", "mvapich"])
def test_launchers_of_several_hosts_need_a_hostfile(launcher: str) -> None:
    with pytest.raises(ValueError, match=f"--launcher {launcher} needs --hostfile"):
        resolve_hosts(LaunchOptions(launcher=launcher), "cpu", 0, 1)


@pytest.mark.parametrize("include", ["node-0:1", "node-0@node-1:0", "node-0:1@node-1:1"])
def test_slots_that_slurm_cannot_give(hostfile: str, include: str) -> None:
    with pytest.raises(ValueError, match="--launcher slurm places ranks by number"):
        resolve_hosts(LaunchOptions(hostfile=hostfile, launcher="slurm", include=include), "cpu", 0, 1)


def test_ports(recipe: Recipe, hostfile: str) -> None:
    for port in (0, -1, 65536):
        with pytest.raises(ValueError, match=f"--master_port is {port}, but ports are 1 to 65535"):
            resolve_hosts(LaunchOptions(master_port=port), "cpu", 0, 1)
    said = LaunchOptions(hostfile=hostfile)
    hosts = resolve_hosts(said, "cpu", 0, 1)
    ports = {plan_launch(said, hosts, "cpu", recipe, None, {}).port for _ in range(8)}
    assert len(ports) > 1 and 29500 not in ports
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert not is_free(busy.getsockname()[1])
    assert is_free(free_port())
