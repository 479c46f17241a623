"""The environment with servers that nobody here wrote, and one process in it for each target.

These tests take most of an hour, so they run when they are named (`pytest tests/served`), and are skipped in
a run of all tests, wherever that is. The environment is looked for in this order: the Python that
EAGLE3_DS_SERVED_PYTHON names; the cached environment of make_environment.sh; with EAGLE3_DS_MAKE_SERVED=1
that environment is made. Else the tests are skipped too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds import serving
from tests.served.judged import Bench, Serve

SCRIPT = Path(__file__).with_name("make_environment.sh")
DECODE = Path(serving.__file__).with_name("decode.py")


FOLDER = Path(__file__).parent


def is_named(argument: str) -> bool:
    """Whether an argument of pytest is this folder, or something in it."""
    path = Path(argument.partition("::")[0]).resolve()
    return path == FOLDER or FOLDER in path.parents


@pytest.fixture(scope="session")
def served_python(pytestconfig: pytest.Config) -> str:
    """A Python that has vLLM, speculators and SpecForge."""
    if not any(map(is_named, pytestconfig.args)):
        pytest.skip("these tests take most of an hour: name them, e.g. pytest tests/served")
    named = os.environ.get("EAGLE3_DS_SERVED_PYTHON")
    if named:
        assert os.access(named, os.X_OK), f"EAGLE3_DS_SERVED_PYTHON = {named} is no program"
        return named
    where = subprocess.run([SCRIPT, "--where"], text=True, capture_output=True, check=True).stdout.strip()
    if not (Path(where) / "complete").is_file() and os.environ.get("EAGLE3_DS_MAKE_SERVED") != "1":
        pytest.skip(
            f"no environment with vLLM: run {SCRIPT.name} once (3 GB from the registry), name its Python in "
            "EAGLE3_DS_SERVED_PYTHON, or set EAGLE3_DS_MAKE_SERVED=1"
        )
    made = subprocess.run([SCRIPT], text=True, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout.strip()


@pytest.fixture(scope="session")
def run_there(served_python: str) -> Callable[..., str]:
    """Run a file of ours by that Python; returns what it prints. One thread: the cores are few."""

    def run(file: Path, *arguments: object) -> str:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        done = subprocess.run(
            [served_python, str(file), *map(str, arguments)],
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def serve(run_there: Callable[..., str]) -> Serve:
    """Let eagle3_ds/serving/decode.py do its jobs in a folder; returns its answers."""

    def run(jobs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_there(DECODE, folder / "jobs.json", folder / "answers.json")
        answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
        return answers

    return run


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Any:
    """Small models only: two threads on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
