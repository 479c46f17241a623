"""A real vLLM answers the prompts of a data set: token for token what the target answers in this process,
also when the server is killed on the way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle3_ds.config import TargetSection
from eagle3_ds.targets import build_target
from tests.served.on_cpu import kill, vllm
from tests.unit.tiny_target import CONVERSATIONS, TEXTS, tiny_build

ROWS = 60


@pytest.fixture(scope="module")
def folder(served_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target`, trained a little so that its turns end, heads of 32 (vLLM's least); a recipe of conversations
    of two questions; and `local.jsonl`, the target's own answers.
    """
    folder = tmp_path_factory.mktemp("answers")
    build = tiny_build(hidden_size=128, intermediate_size=128, steps=60)
    target = TargetSection(path=str(folder / "target"), build=build)
    build_target(target, TEXTS, CONVERSATIONS, progress=False)
    talks = [
        [
            {"role": role, "content": content}
            for question in (f"What is f{n}?", f"And f{n + 1}? {n} times?")
            for role, content in (("user", question), ("assistant", "old"))
        ]
        for n in range(ROWS)
    ]
    rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "r.yaml").write_text(
        f"target: {{path: {folder / 'target'}, dtype: float32}}\n"
        f"data: {{train: [{folder / 'rows.jsonl'}]}}\nsampling: {{max_new_tokens: 60}}\n"
        "train: {steps: 1}\ndeepspeed: x.json\noutput_dir: out\n"
    )
    done = regenerate(folder, "local.jsonl")
    assert done.returncode == 0, done.stderr
    return folder


def command(folder: Path, output: str, *arguments: str) -> list[str]:
    line = [sys.executable, "-m", "eagle3_ds.cli.main", "data", "regenerate", str(folder / "r.yaml")]
    return [*line, "--output", str(folder / output), *arguments]


def regenerate(folder: Path, output: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, output, *arguments), check=False, text=True, capture_output=True)


def test_greedy_answers_are_those_of_this_process_and_a_killed_server_costs_no_row(
    served_python: str, folder: Path
) -> None:
    local = (folder / "local.jsonl").read_bytes()
    learnt = [sum(json.loads(line)["loss_mask"]) for line in local.splitlines()]
    assert len(learnt) > ROWS // 2, "the target hardly ends its turns: little is tested"
    with vllm(served_python, folder / "target", folder) as (url, process):
        done = regenerate(folder, "whole.jsonl", "--server", url, "--concurrency", "8")
        assert done.returncode == 0, done.stderr
        assert (folder / "whole.jsonl").read_bytes() == local
        assert f"of {sum(learnt):,} tokens" in done.stdout and "tokens/s" in done.stdout

        # Killed when some rows are written.
        line = command(folder, "resumed.jsonl", "--server", url, "--concurrency", "1")
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            output = folder / "resumed.jsonl"
            while run.poll() is None and (not output.is_file() or output.read_bytes().count(b"\n") < 5):
                time.sleep(0.01)
            kill(process)
            _, said = run.communicate(timeout=120)
        assert run.returncode == 2 and "the same command then goes on where it stopped" in said
    begun = output.read_bytes()
    assert 5 <= len(begun.splitlines()) < len(learnt) and local.startswith(begun)
    with vllm(served_python, folder / "target", folder) as (url, _):
        done = regenerate(folder, "resumed.jsonl", "--server", url, "--concurrency", "8")
        assert done.returncode == 0, done.stderr
        assert output.read_bytes() == local

        # And a run that is killed itself.
        line = command(folder, "killed.jsonl", "--server", url, "--concurrency", "2")
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
            output = folder / "killed.jsonl"
            while other.poll() is None and not (output.is_file() and output.read_bytes()):
                time.sleep(0.01)
            other.kill()
        assert 0 < len(output.read_bytes().splitlines()) < len(learnt)
        done = regenerate(folder, "killed.jsonl", "--server", url, "--concurrency", "8")
        assert done.returncode == 0, done.stderr
        assert output.read_bytes() == local
