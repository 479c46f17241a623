"""Hosts are asked before anything starts. An `ssh` of our own stands for the network: each name is a kind of
host.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.launch import hosts, meeting
from eagle3_ds.launch.host_table import host_table
from eagle3_ds.launch.hosts import reach
from eagle3_ds.launch.probe import free_port

ROOT = Path(__file__).parents[2]
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
case "$1" in
    good*|localhost) exec sh -c "$2" ;;
    chatty) echo welcome; exec sh -c "$2" ;;
    alone) sh -c "$(echo "$2" | sed 's/seen-by-all/unseen/g')" | sed 's/unseen/seen-by-all/g' ;;
    other) exec sh -c "$(echo "$2" | sed 's/"torch"/"torhc"/')" ;;
    slept) sh -c "$2" | sed 's/"time": [0-9]*/"time": 1700000000/' ;;
    fast) sh -c "$2" | sed 's/"time": [0-9]*/"time": 4000000000/' ;;
    full) sh -c "$2" | sed 's/"disk_free": [0-9]*/"disk_free": 1000/' ;;
    gpus*) sh -c "$2" | sed 's/"devices": {}/"devices": {"nvidia": 2}/' ;;
    walled*) exec sh -c "$(echo "$2" | sed 's/"port": [0-9][0-9]*/"port": 1/')" ;;
    misnamed) GLOO_SOCKET_IFNAME=nowhere exec sh -c "$2" ;;
    bare) echo "no python" >&2; exit 127 ;;
    slow*) exec sleep 30 ;;
    *) echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255 ;;
esac
"""


@pytest.fixture(autouse=True)
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"ssh": SSH, "pdsh": "#!/bin/sh\nexit 9\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 10.0)
    monkeypatch.setattr("eagle3_ds.launch.host_table.REACH_SECONDS", 6.0)
    yield
    assert not list(tmp_path.glob("**/.seen-by-all-hosts-*"))


def test_hosts_that_are_ready(tmp_path: Path) -> None:
    assert reach(("good-1", "chatty", "good-2"), [tmp_path / "output"], [ROOT], free_port()) == []
    assert reach((), [tmp_path]) == []


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (
            "down",
            "ssh does not get there (ssh: connect to host down port 22: No route to host). `ssh down true`",
        ),
        ("bare", f"Python does not run there as it does here (no python). The same checkout ({ROOT})"),
        ("alone", "is not the same folder there as here. Put it on storage that all hosts share"),
        ("other", "torch is None there and "),
    ],
)
def test_a_host_that_is_not_ready_is_named_with_the_fix(tmp_path: Path, host: str, words: str) -> None:
    (line,) = reach(("good", host), [tmp_path / "output"])
    assert line.startswith(f"{host}: ") and words in line


def test_all_hosts_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 1.0)
    start = time.monotonic()
    lines = reach(("slow", "down", "down-2"), [tmp_path])
    assert time.monotonic() - start < 5
    assert [line.partition(":")[0] for line in lines] == ["slow", "down", "down-2"]
    assert "no answer within 1 s" in lines[0]


def test_what_is_not_there_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        missing, taken = reach(("good", "good-2"), [], [tmp_path / "model"], port)[:2]
    assert (
        missing
        == f"good: {tmp_path / 'model'} is not there. Put it on storage that all hosts share, or copy it."
    )
    assert taken.startswith(f"good: somebody listens on port {port} already")


def test_rank_0_listens_on_an_address_of_its_own_host(tmp_path: Path) -> None:
    assert reach(("good", "good-2"), [], address="127.0.0.1") == []
    (line,) = reach(("good", "good-2"), [], address="192.0.2.1")
    assert line.startswith("good: --master_addr is not an address of this host, where rank 0 runs")


def test_no_ssh_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no ssh" in reach(("good",), [])[0]


def launched(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """What `launch` says when it refuses, and that it started nothing."""
    assert main(["launch", "recipes/quickstart.yaml", f"output_dir={folder / 'run'}", *arguments]) == 2
    assert not list((folder / "run").glob("*"))
    return capsys.readouterr().err


def test_launch_asks_every_host_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    path.write_text("down slots=2\nbare slots=2\n")
    said = launched(capsys, tmp_path, "--hostfile", str(path), f"data.cache_dir={tmp_path / 'cache'}")
    assert "The hosts are not ready, so nothing was started:" in said
    assert "\n  down: ssh does not get there" in said and "\n  bare: Python does not run there" in said
    path.write_text("down slots=4\n")
    assert "down: ssh" in launched(
        capsys, tmp_path, "--hostfile", str(path), f"data.cache_dir={tmp_path / 'cache'}"
    )


def test_a_launcher_that_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    path.write_text("good slots=2\ngood-2 slots=2\n")
    arguments = ("--hostfile", str(path), f"data.cache_dir={tmp_path / 'cache'}")
    said = launched(capsys, tmp_path, *arguments, "--launcher", "slurm")
    assert "--launcher slurm: there is no sinfo on this machine's PATH" in said


def test_a_port_of_this_machine_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        said = launched(capsys, tmp_path, "--master_port", str(port))
    assert f"this machine: somebody listens on port {port} already" in said


def hostfile(folder: Path, *names: str) -> str:
    """The first is this machine, by a name that it knows."""
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots=2\n" for name in names))
    return str(path)


@pytest.fixture
def unmet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No all-reduce is tried, for which each host imports torch."""
    monkeypatch.setattr("eagle3_ds.launch.host_table._met", lambda rows, answers: list(rows))


def test_a_table_of_hosts_that_are_ready(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    rows = host_table(hostfile(tmp_path, "localhost", "chatty", "good"), folder)
    assert [row.problems for row in rows] == [(), (), ()]
    first, second, _ = rows
    cores = len(os.sched_getaffinity(0))
    assert (first.host, first.ssh, first.versions, first.devices) == (
        "localhost", "yes", "the same", f"{cores} cores, 2 slots",
    )  # fmt: skip
    free = shutil.disk_usage(folder).free
    shared, told = second.folder.split(", ")
    assert shared == "shared"
    assert float(told.removesuffix(" GiB free").replace(",", "")) == pytest.approx(free / 2**30, abs=1.5)
    assert second.clock.startswith("±")
    for row in rows:
        assert 0 < float(row.meets.removeprefix("gloo, ").removesuffix(" ms")) < 5000


@pytest.mark.parametrize(
    ("host", "column", "value", "words"),
    [
        ("down", "ssh", "no", "ssh does not get there"),
        ("bare", "ssh", "no", "Python does not run there as it does here"),
        ("other", "versions", "others", "Use the same checkout and environment on all hosts"),
        ("alone", "folder", "not shared", "Put it on storage that all hosts share"),
        ("full", "folder", "shared, 0 GiB", "0.00 GiB are free for the output folder, less than one. Make"),
        ("fast", "clock", "+2", "ahead of this machine's. Set both by NTP"),
        ("slept", "clock", "-", "behind this machine's. Set both by NTP"),
    ],
)
def test_what_is_wrong_with_a_host_stands_in_its_row_with_the_fix(
    host: str, column: str, value: str, words: str, tmp_path: Path, unmet: None
) -> None:
    first, second = host_table(hostfile(tmp_path, "localhost", host), tmp_path / "output")
    assert first.problems == ()
    assert getattr(second, column).startswith(value)
    (line,) = second.problems
    assert line.startswith(f"{host}: ") and words in line


def test_a_host_that_does_not_reach_rank_0_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    first, second, third = host_table(hostfile(tmp_path, "localhost", "walled", "good"), tmp_path)
    assert [row.meets for row in (first, second, third)] == ["gloo: no"] * 3
    (line,) = second.problems
    assert line.startswith("walled: it does not reach rank 0 on localhost, address ")
    assert "Open ports 20000 to 29999 between the hosts" in line
    assert first.problems == ("localhost: its all-reduce by gloo waited for walled: see there.",)
    assert third.problems == ("good: its all-reduce by gloo waited for walled: see there.",)


def test_an_interface_that_a_host_does_not_have(tmp_path: Path) -> None:
    rows = host_table(hostfile(tmp_path, "localhost", "misnamed"), tmp_path)
    for row in rows:
        assert row.meets == "gloo: no"
        (line,) = row.problems
        assert line.startswith(f"{row.host}: an all-reduce by gloo over the hosts fails (")
    assert "no end within 12 s" in rows[0].problems[0] and "nowhere" in rows[1].problems[0]


def test_a_sum_that_is_not_right_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meeting.meet("127.0.0.1", free_port(), rank=0, ranks=1, seconds=20.0)
    right = json.loads(capsys.readouterr().out)
    assert (right["backend"], right["reached"], right["why"]) == ("gloo", True, "")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.add_(1.0))
    meeting.meet("127.0.0.1", free_port(), rank=0, ranks=1, seconds=20.0)
    assert json.loads(capsys.readouterr().out)["why"] == "the sum of 1 to 1 is 2"


def test_one_host_that_answers_has_nobody_to_meet(tmp_path: Path) -> None:
    first, second = host_table(hostfile(tmp_path, "down", "good"), tmp_path)
    assert (first.meets, second.meets) == ("?", "?")
    assert len(first.problems) == 1 and second.problems == ()


def test_devices_are_wanted_where_a_host_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmet: None
) -> None:
    path = hostfile(tmp_path, "localhost", "gpus")
    first, second = host_table(path, tmp_path)
    assert second.devices == "2 nvidia, 2 slots" and first.problems == second.problems == ()
    monkeypatch.delenv("DS_ACCELERATOR")
    first, second = host_table(path, tmp_path)
    assert second.problems == ()
    assert "localhost: the hostfile says slots=2, but 0 devices are there" in first.problems[0]


def test_a_host_that_is_silent_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmet: None
) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 5.0)
    start = time.monotonic()
    rows = host_table(hostfile(tmp_path, "localhost", "slow", "slow-too", "chatty"), tmp_path)
    assert time.monotonic() - start < 15
    assert [row.ssh for row in rows] == ["yes", "no", "no", "yes"]
    assert "no answer within 5 s" in rows[1].problems[0]


def test_hosts_get_the_variables_that_ranks_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    command = tmp_path / "command"
    (tmp_path / "bin" / "ssh").write_text(f'#!/bin/sh\necho "$@" > {command}\nexit 255\n')
    reach(("good",), [])
    assert "NCCL_SOCKET_IFNAME=ib0,ib1" in command.read_text() and "secret" not in command.read_text()


def test_doctor_shows_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eagle3_ds.run.machine.check_kernels", lambda *_: [])
    monkeypatch.setenv("COLUMNS", "300")
    output = ["--output_dir", str(tmp_path / "output")]
    assert main(["doctor", "--hostfile", hostfile(tmp_path, "localhost"), *output]) == 0
    said = capsys.readouterr().out
    assert "broken" not in said
    (row,) = [line for line in said.splitlines() if line.startswith("│ localhost")]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["yes", "yes", "the same"]
    assert main(["doctor", "--hostfile", hostfile(tmp_path, "localhost", "down"), *output]) == 1
    said = capsys.readouterr().out
    assert "broken: down: ssh does not get there" in said
    (row,) = [line for line in said.splitlines() if line.startswith("│ down")]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["no", "no", "?"]


def test_an_output_folder_is_asked_of_hosts_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output_dir", "x"]) == 2
    assert "--hostfile" in capsys.readouterr().err
