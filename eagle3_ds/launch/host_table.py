"""What every host of a hostfile is like, before a run: a row for each, and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eagle3_ds.launch import meeting, probe
from eagle3_ds.launch.command import read_hostfile
from eagle3_ds.launch.hosts import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    ask_all,
    judge,
    marked,
    question_of,
    ssh_command,
    text_of,
)

CLOCK_SECONDS = 2.0
"""Clocks further apart tell wrongly which rank failed first."""
LEAST_DISK = 2**30
GIB = 2**30
UNKNOWN = "?"


@dataclass(frozen=True)
class HostRow:
    """One host, in words; `?` is what was not found out.

    Attributes:
        ssh: whether it answers.
        packages: whether Python, packages and code are those of this machine.
        folder: whether the output folder is shared with this machine.
        disk: free there.
        clock: how far it is ahead of this machine's, as far as its answer tells.
        meets: how long it takes to connect to the first host, where rank 0 listens.
        problems: what is wrong, each a line that begins with the host and ends with the fix.
    """

    host: str
    slots: int
    ssh: str = "no"
    packages: str = UNKNOWN
    devices: str = UNKNOWN
    folder: str = UNKNOWN
    disk: str = UNKNOWN
    clock: str = UNKNOWN
    meets: str = UNKNOWN
    problems: tuple[str, ...] = ()


def host_table(hostfile: str, output_dir: Path) -> list[HostRow]:
    """Ask all hosts of a hostfile at the same time, then let all connect to the first one.

    Args:
        output_dir: the folder that a run would write to. It is made, and holds a file while this runs.

    Raises:
        ValueError: the hostfile is missing or malformed, or this machine has no ssh.
    """
    slots = read_hostfile(hostfile)
    if shutil.which("ssh") is None:
        raise ValueError(
            "there is no ssh on this machine's PATH, so no host can be reached. Install OpenSSH's client."
        )
    with marked([output_dir]) as marks:
        question = question_of(list(marks), output_dir)
        own = probe.answer(question)["versions"]
        answers = ask_all(tuple(slots), probe, [question] * len(slots))
    # Where no host has devices, or DS_ACCELERATOR says so, ranks run on processors.
    wants_devices = os.environ.get("DS_ACCELERATOR") != "cpu" and any(
        isinstance(answer, dict) and answer["devices"] for answer in answers
    )
    rows = [
        HostRow(host, len(numbers), problems=(answer,))
        if isinstance(answer, str)
        else _row(host, len(numbers), answer, own, marks, wants_devices)
        for (host, numbers), answer in zip(slots.items(), answers, strict=True)
    ]
    return _met(rows)


def _row(
    host: str,
    slots: int,
    answer: Mapping[str, Any],
    own: Mapping[str, str],
    marks: Mapping[str, Path],
    wants_devices: bool,
) -> HostRow:
    ahead = _ahead(answer)
    counts, free = answer["devices"], answer["disk_free"]
    problems = judge(host, answer, own, marks, None)
    if wants_devices and sum(counts.values()) < slots:
        problems.append(
            f"{host}: the hostfile says slots={slots}, but {sum(counts.values())} devices are there. Write "
            "that number, or see why the driver does not show the others."
        )
    if free < LEAST_DISK:
        problems.append(
            f"{host}: {free / GIB:.2f} GiB are free for the output folder, less than one. Make room, or "
            "choose another by --output_dir."
        )
    if abs(ahead) > CLOCK_SECONDS:
        way = "ahead of" if ahead > 0 else "behind"
        problems.append(
            f"{host}: its clock is at least {abs(ahead):.1f} s {way} this machine's. Set both by NTP, for "
            "example by `chronyc makestep`."
        )
    return HostRow(
        host,
        slots,
        "yes",
        "the same" if answer["versions"] == dict(own) else "others",
        ", ".join(f"{count} {kind}" for kind, count in counts.items()) or f"none, {answer['cores']} cores",
        "not shared" if answer["missing"] else "shared",
        f"{free / GIB:,.0f} GiB",
        f"{ahead:+.1f} s" if ahead else f"within {answer['heard'] - answer['asked']:.1f} s",
        problems=tuple(problems),
    )


def _ahead(answer: Mapping[str, Any]) -> float:
    """Seconds by which a host's clock is ahead of this one's at least, negative if behind: 0 where it lies
    between asking and hearing, of which it may be any moment.
    """
    asked, there, heard = answer["asked"], answer["time"], answer["heard"]
    return float(max(0.0, there - heard) or min(0.0, there - asked))


def _met(rows: Sequence[HostRow]) -> list[HostRow]:
    """The rows with what came of connecting to the first host, for those that answer."""
    first = rows[0]
    others = [row.host for row in rows[1:] if row.ssh == "yes"]
    if first.ssh != "yes":
        return list(rows)
    if not others:
        return [replace(first, meets="is the first"), *rows[1:]]
    with _listening(first.host, len(others)) as place:
        if isinstance(place, str):
            return [replace(first, meets="no", problems=(*first.problems, place)), *rows[1:]]
        visit = {"listens": False, "name": first.host, **place, "seconds": CONNECT_SECONDS}
        answers = dict(zip(others, ask_all(others, meeting, [visit] * len(others)), strict=True))
    where = f"{place['address']}, port {place['port']}"
    return [
        replace(first, meets=f"is the first, {place['address']}"),
        *(_visitor(row, first.host, answers.get(row.host), where) for row in rows[1:]),
    ]


def _visitor(row: HostRow, first: str, answer: dict[str, Any] | str | None, where: str) -> HostRow:
    if answer is None:
        return row
    if isinstance(answer, str):
        return replace(row, meets="no", problems=(*row.problems, answer))
    problems = list(row.problems)
    if answer["unresolved"]:
        problems.append(
            f"{row.host}: it does not know the name {first} ({answer['unresolved']}). Put it into DNS or "
            "/etc/hosts, or write addresses into the hostfile."
        )
    if answer["unreached"]:
        problems.append(
            f"{row.host}: it does not reach {first} at {where} ({answer['unreached']}), where rank 0 would "
            "listen. Open ports 20000 to 29999 between the hosts, or name another address of it by "
            "--master_addr and a port that is open by --master_port."
        )
    meets = "no" if answer["unreached"] else f"{1000 * answer['seconds']:.1f} ms"
    return replace(row, meets=meets, problems=tuple(problems))


@contextmanager
def _listening(host: str, visitors: int) -> Iterator[dict[str, Any] | str]:
    """During the block the host listens: yields its `address` and `port`, or why it does not."""
    question = {"listens": True, "name": host, "visitors": visitors, "seconds": ANSWER_SECONDS}
    with subprocess.Popen(
        ssh_command(host, question),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        limit = threading.Timer(ANSWER_SECONDS, process.kill)
        limit.start()
        try:
            # Where ssh has ended already, its last words say why.
            with suppress(BrokenPipeError):
                process.stdin.write(text_of(meeting))
                process.stdin.close()
            # A login shell's greeting may come before the place.
            told = next((line for line in process.stdout if line.startswith("{")), None)
            if told is not None:
                yield json.loads(told)
            else:
                said = (process.stderr.read().strip().splitlines() or ["it said nothing"])[-1]
                yield f"{host}: it cannot listen for the others ({said}). Free a port from 20000 to 29999."
        finally:
            limit.cancel()
            process.kill()
