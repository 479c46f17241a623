"""The examples of an RL loop, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.e2e.small_quickstart import ROOT

pytestmark = pytest.mark.e2e


def run_example(name: str, folder: Path, *words: str) -> list[str]:
    """Run an example in and into a folder, with options and overrides; returns its lines of iterations."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    places = (f"output_dir={folder}", f"target.path={folder / 'target'}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *words, *places],
        cwd=folder,  # it runs from anywhere
        env=environment | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "`torch.distributed." not in done.stderr  # DeepSpeed's old names of collectives
    return [line for line in done.stdout.splitlines() if line.startswith("iteration")]


def test_the_example_runs_without_a_launcher(tmp_path):
    smaller = ("target.build.steps=2", "draft.ttt_steps=2")
    lines = run_example("rl_loop.py", tmp_path, "--iterations", "2", *smaller)
    assert [line.split(":")[0] for line in lines] == ["iteration 1", "iteration 2"]
    assert all("13 tensors for the server" in line for line in lines)
    assert (tmp_path / "checkpoints" / "latest.json").is_file()


def test_a_refreshed_draft_beats_the_one_that_the_loop_began_with(tmp_path):
    # More capitals to begin with than by default: a policy this small, which each processor rounds otherwise,
    # may never answer in them in so few iterations, and then has nothing to learn.
    short = ("--iterations", "7", "--unasked", "0.35", "target.build.batch_size=4")
    lines = run_example("rl_drift.py", tmp_path, *short)
    points = json.loads((tmp_path / "drift.json").read_text())["points"]
    assert [point["iteration"] for point in points] == list(range(8)) and len(lines) == 8
    first, last, steps = points[0], points[-1], [point["steps"] for point in points]
    assert first["stale"] == first["refreshed"] > 2, "one draft, which was trained on the policy"
    assert last["stale"] < 0.9 * first["stale"], "the policy did not drift"
    assert last["refreshed"] > last["stale"] + 0.4, points
    assert last["refreshed_interval"][0] > last["stale_interval"][1], "they may be equal"
    assert not steps[0] and any(steps), "the draft is trained once its acceptance has fallen"
    height, width, _ = imread(tmp_path / "drift.png").shape
    assert height > 400 and width > 800
