"""Checking all hosts by ssh before anything starts: at the same time, within seconds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

from eagle3_ds.launch import probe
from eagle3_ds.launch.command import MPI_LAUNCHERS, LaunchPlan, exported_variables
from eagle3_ds.launch.probe import is_free

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy", "pydantic")
CONNECT_SECONDS = 5
# How long a host may take to answer; it may have to read Python from a slow file system.
ANSWER_SECONDS = 20.0
# {launcher: the program that DeepSpeed looks for when it uses it}.
_PROGRAMS: Mapping[str, str] = {
    "pdsh": "pdsh",
    "slurm": "sinfo",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpiname",
}


def check_places(
    plan: LaunchPlan, launcher: str | None, folders: Sequence[Path], paths: Sequence[Path]
) -> None:
    """Check what a run needs of its hosts: the launcher's program, a free port, and for each host what
    `reach` checks.

    Raises:
        ValueError: something is wrong. The message lists each problem with its host and the fix.
    """
    problems = []
    if plan.exported is None:
        if plan.port is not None and not is_free(plan.port):
            problems.append(_busy("this machine", plan.port))
    else:
        program = _PROGRAMS[launcher or "pdsh"]
        if shutil.which(program) is None:
            instead = "pdsh" if launcher in ("slurm", *MPI_LAUNCHERS) else "slurm"
            problems.append(
                f"--launcher {launcher or 'pdsh'}: there is no {program} on this machine's PATH. Install "
                f"it, or use another, e.g. --launcher {instead}."
            )
        problems += reach(plan.by_ssh, folders, paths, plan.port, plan.address)
    if problems:
        raise ValueError("\n  ".join(["The hosts are not ready, so nothing was started:", *problems]))


def reach(
    hosts: Sequence[str],
    folders: Sequence[Path],
    paths: Sequence[Path] = (),
    port: int | None = None,
    address: str | None = None,
) -> list[str]:
    """Ask all hosts at the same time: whether ssh reaches them, whether their packages and code are those of
    this machine, and whether the folders are shared.

    Args:
        folders: folders that all hosts must share. Each gets a file while this runs.
        paths: files or folders that must exist on all hosts.
        port: a port that must be free on the first host.
        address: an address that the first host must have.

    Returns:
        The problems, one line each; empty when all hosts can be used.
    """
    if not hosts:
        return []
    if shutil.which("ssh") is None:
        return [
            "there is no ssh on this machine's PATH, so no host can be reached. Install OpenSSH's client."
        ]
    with marked(folders) as marks:
        question = question_of([*marks, *(str(path.resolve()) for path in paths)])
        own = probe.answer(question)["versions"]
        first = {**question, "port": port, "address": address}
        answers = ask_all(hosts, probe, [first, *[question] * (len(hosts) - 1)])
    return [
        line
        for host, found in zip(hosts, answers, strict=True)
        for line in ([found] if isinstance(found, str) else judge(host, found, own, marks, port))
    ]


def question_of(paths: Sequence[str], disk: Path | None = None) -> dict[str, Any]:
    """What `probe.answer` is asked of any host.

    Args:
        paths: files that must exist.
        disk: the folder whose disk is looked at; None is the current one.
    """
    return {
        "packages": PACKAGES,
        "code": str(Path(__file__).parents[1]),
        "paths": paths,
        "disk": str((disk or Path()).resolve()),
        "port": None,
        "address": None,
    }


def ask_all(
    hosts: Sequence[str],
    program: ModuleType,
    questions: Sequence[Mapping[str, Any]],
    seconds: float | None = None,
) -> list[dict[str, Any] | str]:
    """Send a program's text to all hosts and run it there at the same time, each with its question as JSON.

    Args:
        seconds: how long an answer may take; None is `ANSWER_SECONDS`.

    Returns:
        What each answered by its last line, or why there is no answer and what to do, in a line.
    """
    ask = partial(_ask, program, ANSWER_SECONDS if seconds is None else seconds)
    # None waits for a thread: the hosts may wait for each other.
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(ask, hosts, questions))


@contextmanager
def marked(folders: Sequence[Path]) -> Iterator[Mapping[str, Path]]:
    """During the block, each folder has a file with a unique name, by which other hosts recognise it."""
    with ExitStack() as stack:
        marks = {}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            mark = stack.enter_context(NamedTemporaryFile(dir=folder.resolve(), prefix=".seen-by-all-hosts-"))
            marks[mark.name] = folder
        yield marks


def _ssh_command(host: str, question: Mapping[str, Any]) -> list[str]:
    """The command that runs a program on a host as ranks are run, with its text as input."""
    variables = exported_variables(os.environ)
    if os.environ.get("PYTHONPATH"):
        # DeepSpeed hands it to ranks by itself.
        variables["PYTHONPATH"] = os.environ["PYTHONPATH"]
    carried = [f"{name}={value}" for name, value in variables.items()]
    there = shlex.join(["env", *carried, sys.executable, "-", json.dumps(question)])
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    return ["ssh", *options, host, f"cd {shlex.quote(os.getcwd())} && {there}"]


def _ask(program: ModuleType, seconds: float, host: str, question: Mapping[str, Any]) -> dict[str, Any] | str:
    """A host's answer and when it was asked and heard, in seconds since 1970; or why there is none."""
    asked = time.time()
    try:
        done = subprocess.run(
            _ssh_command(host, question),
            input=Path(str(program.__file__)).read_text(encoding="utf-8"),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{host}: no answer within {seconds:.0f} s. See whether `ssh {host} true` ends."
    # A login shell's greeting may come before the answer.
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and last.startswith("{"):
        return {**json.loads(last), "asked": asked, "heard": time.time()}
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    # 255 is ssh's own exit status; any other is that of the command on the host.
    if done.returncode == 255:
        return (
            f"{host}: ssh does not get there ({said}). `ssh {host} true` must end without a question: check "
            "the name, the key and the known host keys, or leave the host out by --exclude."
        )
    return (
        f"{host}: Python does not run there as it does here ({said}). The same checkout ({os.getcwd()}) and "
        f"environment ({sys.executable}) must be there, at the same paths."
    )


def judge(
    host: str, found: Mapping[str, Any], own: Mapping[str, str], marks: Mapping[str, Path], port: int | None
) -> list[str]:
    """The problems of a host that has answered."""
    lines = []
    different = [
        f"{what} is {found['versions'].get(what)} there and {value} here"
        for what, value in own.items()
        if found["versions"].get(what) != value
    ]
    if different:
        lines.append(f"{host}: {'; '.join(different)}. Use the same checkout and environment on all hosts.")
    for path in found["missing"]:
        if path in marks:
            lines.append(
                f"{host}: {marks[path]} is not the same folder there as here. Put it on storage that all "
                f"hosts share."
            )
        else:
            lines.append(f"{host}: {path} is not there. Put it on storage that all hosts share, or copy it.")
    if not found["free"] and port is not None:
        lines.append(_busy(host, port))
    if not found["own"]:
        lines.append(
            f"{host}: --master_addr is not an address of this host, where rank 0 runs. Leave it out, or "
            "give one of its own."
        )
    return lines


def _busy(host: str, port: int) -> str:
    return (
        f"{host}: somebody listens on port {port} already. Leave --master_port out for a free one, "
        f"or give another."
    )
