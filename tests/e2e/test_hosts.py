"""Two real hosts, as far as one machine can be two: own network, own sshd, a cable between them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle3_ds.config import dump_recipe
from judge import two_hosts
from judge.resume_runs import Shape, make_recipe, prepare_inputs, read_metrics, run, start_output
from judge.two_hosts import TwoHosts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(two_hosts.why_not() is not None, reason=str(two_hosts.why_not())),
]

ROOT = Path(__file__).parents[2]
STEPS = 4
LIMIT_SECONDS = 30.0
# Sums over the ranks are taken in another order.
TOLERANCE = 1e-5
# Draft_dp 1 and accumulation 4, or 2 and 2: the same packs in each step.
ONE_RANK = Shape(1, 1, 1, 4, "zero0", "all")
TWO_BY_TWO = Shape(2, 1, 2, 2, "zero3", "all")
RING = Shape(1, 2, 1, 4, "zero3", "all")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts.two_hosts(tmp_path_factory.mktemp("hosts"), slots=2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, its data and hidden states."""
    folder = tmp_path_factory.mktemp("inputs")
    prepare_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one rank on this host."""
    output = tmp_path_factory.mktemp("alone") / "output"
    start_output(inputs, output)
    run(make_recipe(inputs, ONE_RANK, output, steps=STEPS), 1)
    return losses(output)


def losses(output: Path) -> list[float]:
    records = read_metrics(output)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def launch(hosts: TwoHosts, recipe: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    """`./launch.sh RECIPE --hostfile F` on the first host; what it says goes to a file."""
    line = [
        str(ROOT / "launch.sh"),
        str(recipe),
        "--hostfile",
        str(hosts.hostfile),
        "export.formats=[]",
        *arguments,
    ]
    log = recipe.with_suffix(".log")
    return hosts.start(line, ROOT, log), log


def write_recipe(inputs: Path, shape: Shape, output: Path) -> Path:
    path = output.with_suffix(".yaml")
    path.write_text(dump_recipe(make_recipe(inputs, shape, output, steps=STEPS)))
    return path


def test_hosts_are_reached_before_anything_starts(hosts: TwoHosts, inputs: Path, tmp_path: Path) -> None:
    doctor = [str(ROOT / "launch.sh"), "doctor", "--hostfile"]
    log = tmp_path / "doctor.log"
    # The table's cells take one line each in a terminal this wide.
    wide = {"COLUMNS": "200"}
    assert hosts.start([*doctor, str(hosts.hostfile)], ROOT, log, **wide).wait() == 0, log.read_text()
    rows = {line.split()[1]: line for line in log.read_text().splitlines() if "│ 198.18.0." in line}
    assert list(rows) == list(two_hosts.ADDRESSES)
    for row in rows.values():
        cells = [cell.strip() for cell in row.split("│")[2:-1]]
        assert cells[:3] == ["yes", "yes", "the same"] and cells[3].endswith(" cores, 2 slots")
        assert cells[4].startswith("shared, ") and re.fullmatch(r"gloo, \d+\.\d ms", cells[6])
    # An address of the same kind that no host has.
    far = tmp_path / "far"
    far.write_text(hosts.hostfile.read_text().replace(two_hosts.ADDRESSES[1], "198.18.0.3"))
    assert hosts.start([*doctor, str(far)], ROOT, log).wait() == 1
    assert "broken: 198.18.0.3: ssh does not get there" in log.read_text()
    output = tmp_path / "output"
    recipe = write_recipe(inputs, RING, output)
    process, log = launch(hosts, recipe, "--num_gpus", "1", "--hostfile", str(far))
    assert process.wait(3 * LIMIT_SECONDS) == 2, log.read_text()
    last = log.read_text().rstrip().splitlines()[-1]
    assert "198.18.0.3: ssh does not get there" in last and "Traceback" not in log.read_text()
    assert not list(output.glob("*"))


def test_the_ranks_of_one_host_left_run_there(
    hosts: TwoHosts, inputs: Path, reference: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    process, log = launch(hosts, write_recipe(inputs, RING, output), "--include", two_hosts.ADDRESSES[1])
    here, there = 0, 0
    while process.poll() is None:
        here, there = max(here, len(hosts.ranks(0))), max(there, len(hosts.ranks(1)))
        time.sleep(0.1)
    assert process.returncode == 0, log.read_text()
    # For a moment a fork of a rank looks like one.
    assert here == 0 and there >= 2
    assert losses(output) == pytest.approx(reference, rel=TOLERANCE)


def test_zero3_over_both_hosts_survives_the_death_of_one(
    hosts: TwoHosts, inputs: Path, reference: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    recipe = write_recipe(inputs, TWO_BY_TWO, output)
    process, log = launch(hosts, recipe)
    saved = output / "checkpoints" / "latest.json"
    while process.poll() is None and not saved.is_file():
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()
    killed = hosts.ranks(1)
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT_SECONDS) != 0
    assert hosts.ranks(0) == hosts.ranks(1) == []
    last = log.read_text().partition("\nIf memory was the reason")[0].rstrip().splitlines()[-1]
    assert last.startswith("First error, of rank ") and "signal 9 (SIGKILL)" in last, log.read_text()

    # On from the checkpoint, over a bad cable: only slower.
    hosts.cable.delay, hosts.cable.loss = 0.005, 0.002
    try:
        process, log = launch(hosts, recipe, "--resume")
        assert process.wait() == 0, log.read_text()
    finally:
        hosts.cable.delay, hosts.cable.loss = 0.0, 0.0
    assert hosts.cable.lost > 0
    assert losses(output) == pytest.approx(reference, rel=TOLERANCE)


def test_the_ring_crosses_hosts(
    hosts: TwoHosts, inputs: Path, reference: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    process, log = launch(hosts, write_recipe(inputs, RING, output), "--num_gpus", "1")
    assert process.wait() == 0, log.read_text()
    assert losses(output) == pytest.approx(reference, rel=TOLERANCE)
