"""The example of an RL loop, run as a user runs it."""

import os
import subprocess
import sys

import pytest

from tests.e2e.small_quickstart import ROOT

pytestmark = pytest.mark.e2e


def test_the_example_runs_without_a_launcher(tmp_path):
    overrides = [
        f"output_dir={tmp_path}",
        f"target.path={tmp_path / 'target'}",
        "target.build.steps=2",
        "draft.ttt_steps=2",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/rl_loop.py"), "--iterations", "2", *overrides],
        cwd=tmp_path,  # it runs from anywhere
        env=environment | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "`torch.distributed." not in done.stderr  # DeepSpeed's old names of collectives
    lines = [line for line in done.stdout.splitlines() if line.startswith("iteration")]
    assert [line.split(":")[0] for line in lines] == ["iteration 1", "iteration 2"]
    assert all("13 tensors for the server" in line for line in lines)
    assert (tmp_path / "checkpoints" / "latest.json").is_file()
