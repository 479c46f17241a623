"""The Slurm batch script of docs/multi-node.md, run with stand-ins for what it calls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "multi-node.md"
# Waits for the signal, then says so by a file and by its exit status.
STOPPED = "trap 'touch stopped; exit 75' USR1\ntouch started\nwhile :; do sleep 0.05; done"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", DOCS.read_text(), flags=re.DOTALL)
    stand_in(tmp_path / "job", script.partition("\n")[2])
    stand_in(
        tmp_path / "scontrol",
        'if [ "$1" = show ]; then printf "node-0\\nnode-1\\n"; else echo "$@" >> requeued; fi',
    )
    return tmp_path


def stand_in(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def start(job: Path, launch: str) -> subprocess.Popen[bytes]:
    stand_in(job / "launch.sh", f'printf "%s\\n" "$@" > arguments\n{launch}')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "PATH": f"{job}:{os.environ['PATH']}"}
    return subprocess.Popen([str(job / "job")], cwd=job, env={**os.environ, **slurm})


def test_a_run_that_finishes(job: Path) -> None:
    end = "mkdir -p output/qwen3-32b_128k_2nodes; touch output/qwen3-32b_128k_2nodes/draft-final.safetensors"
    assert start(job, end).wait(20) == 0
    assert (job / "hosts.7").read_text() == "node-0 slots=8\nnode-1 slots=8\n"
    arguments = (job / "arguments").read_text().split("\n")
    assert (
        arguments[:1] == ["recipes/qwen3-32b_128k_2nodes.yaml"]
        and "--resume" in arguments
        and "hosts.7" in arguments
    )
    assert not (job / "requeued").exists()


def test_a_run_that_fails_keeps_its_status(job: Path) -> None:
    assert start(job, "exit 3").wait(20) == 3
    assert not (job / "requeued").exists()


def test_a_run_that_is_stopped_is_requeued(job: Path) -> None:
    process = start(job, STOPPED)
    while not (job / "started").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert (job / "stopped").exists()
    assert (job / "requeued").read_text() == "requeue 7\n"
