"""A scheduler's view: one command that is started, told to stop, and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from eagle3_ds.launch.logs import Logs
from eagle3_ds.launch.state import Steps, read_steps
from eagle3_ds.watch import RunReader
from tests.e2e.small_quickstart import QUICKSTART, ROOT, STEPS, Job, small_job

pytestmark = pytest.mark.e2e
# The schedule of the small quickstart is constant, so that a longer run begins as `finished` does.
LONG = ("train.steps=1000", "eval.num_prompts=0")


def test_a_second_sigint_stops_at_once(shared: Path, tmp_path: Path) -> None:
    """A step of 400 packs takes long enough for the first SIGINT to be waiting when the second comes."""
    job = small_job(shared, tmp_path / "output", *LONG, "train.accumulation=400")
    process = subprocess.Popen(
        [str(ROOT / "launch.sh"), QUICKSTART, *job.overrides],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log, control = job.folder / "logs" / "rank_0.log", job.folder / "logs" / "control"
    for words, path in (("training:   0%", log), ("signal SIGINT", control)):
        while process.poll() is None and not (path.is_file() and words in path.read_text()):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGINT)
        asked = time.time()
    output, _ = process.communicate()
    assert process.returncode not in (0, 75)
    # The launcher takes longer to notice that its ranks are gone.
    ends = Logs(log.parent).ends(4)
    assert [(end.how, end.time - asked < 3.0) for end in ends.values()] == [("ended", True)] * 4, ends
    assert "a second SIGINT came" in output.rstrip().splitlines()[-1]
    assert not (job.folder / "checkpoints").exists()
    assert "FutureWarning" not in output


def stopped_by(sent: signal.Signals, line: list[str], job: Job, done: int) -> tuple[int, str]:
    """The run, told so a few steps on: the step of its checkpoint, and what it said."""
    process = subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = job.folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > done + 1):
        time.sleep(0.05)
    seen = RunReader(job.folder).read()
    process.send_signal(sent)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert seen.state.startswith("training (process ") and not seen.has_ended
    assert (seen.progress.last, {rank.state for rank in seen.ranks}) == (1000, {"running"})
    assert "by a request, exit status 75" in RunReader(job.folder).read().state
    return json.loads((job.folder / "checkpoints" / "latest.json").read_text())["step"], output


def checkpoint(job: Job, step: int) -> Path:
    return job.folder / "checkpoints" / f"step-{step:06d}"


def test_a_run_that_is_told_to_stop_is_gone_on_with_by_the_same_command(
    finished: Job, shared: Path, tmp_path: Path
) -> None:
    job = small_job(shared, tmp_path / "output", *LONG)
    line = [str(ROOT / "launch.sh"), QUICKSTART, *job.overrides, "--resume", "auto"]
    done = 0
    for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        before, (done, output) = done, stopped_by(sent, line, job, done)
        assert len(job.metrics()) == done and before < done < 1000
        origin = f"going on from {checkpoint(job, before)}" if before else "there is no checkpoint yet"
        for words in (
            origin,
            f"stopped by {sent.name} after step {done} of 1000",
            "the same command with --resume",
        ):
            assert words in output
    assert not (job.folder / "draft").exists()

    status, output = job.call("launch", f"train.steps={done + 1}", "--resume", "auto")
    assert status == 0, output
    assert f"going on from {checkpoint(job, done)}" in output
    assert [record["step"] for record in job.metrics()] == list(range(1, done + 2))
    assert read_steps(job.folder) == Steps(done, done + 1)
    assert RunReader(job.folder).read().state == "finished"
    both = min(STEPS, done + 1)
    assert [record["loss"] for record in job.metrics()[:both]] == [
        record["loss"] for record in finished.metrics()[:both]
    ]
    assert (job.folder / "draft" / "model.safetensors").is_file()
