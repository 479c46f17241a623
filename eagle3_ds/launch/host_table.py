"""What every host of a hostfile is like, before a run: a row for each, and what is wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eagle3_ds.device.kinds import CPU, forced_kind
from eagle3_ds.launch import meeting, probe
from eagle3_ds.launch.command import read_hostfile
from eagle3_ds.launch.hosts import ANSWER_SECONDS, ask_all, judge, marked, question_of
from eagle3_ds.launch.probe import PORTS

CLOCK_SECONDS = 2.0
"""Clocks further apart tell wrongly which rank failed first."""
REACH_SECONDS = 20.0
"""How long a host tries to reach rank 0."""
LEAST_DISK = 2**30
GIB = 2**30
UNKNOWN = "?"


@dataclass(frozen=True)
class HostRow:
    """One host, in words; `?` is what was not found out.

    Attributes:
        ssh: whether it answers.
        versions: whether those of Python, packages and code are this machine's.
        devices: how many there are, or cores where none are, and how many the hostfile says.
        folder: whether the output folder is shared with this machine, and what is free there.
        clock: how far it is ahead of this machine's, as far as its answer tells.
        meets: the backend and time of a small all-reduce over all hosts that answer.
        problems: what is wrong, each a line that begins with the host and ends with the fix.
    """

    host: str
    ssh: str = "no"
    versions: str = UNKNOWN
    devices: str = UNKNOWN
    folder: str = UNKNOWN
    clock: str = UNKNOWN
    meets: str = UNKNOWN
    problems: tuple[str, ...] = ()


def host_table(hostfile: str, output_dir: Path) -> list[HostRow]:
    """Ask all hosts of a hostfile at the same time, then let those that answer try an all-reduce.

    Args:
        output_dir: the folder that a run would write to. It is made, and holds a file while this runs.

    Raises:
        ValueError: the hostfile is missing or malformed, this machine has no ssh, or one of its variables
            cannot be handed to ranks.
    """
    slots = read_hostfile(hostfile)
    if shutil.which("ssh") is None:
        raise ValueError(
            "there is no ssh on this machine's PATH, so no host can be reached. Install OpenSSH's client."
        )
    with marked([output_dir]) as marks:
        question = question_of(list(marks), output_dir)
        own = probe.answer(question)["versions"]
        answers = dict(zip(slots, ask_all(tuple(slots), probe, [question] * len(slots)), strict=True))
    good = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    # Where no host has devices, or DS_ACCELERATOR says so, ranks run on processors.
    wants_devices = forced_kind() != CPU and any(answer["devices"] for answer in good.values())
    rows = [
        HostRow(host, problems=(answer,))
        if isinstance(answer, str)
        else _row(host, len(numbers), answer, own, marks, wants_devices)
        for (host, answer), numbers in zip(answers.items(), slots.values(), strict=True)
    ]
    return _met(rows, good)


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
    there = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or f"{answer['cores']} cores"
    return HostRow(
        host,
        "yes",
        "the same" if answer["versions"] == dict(own) else "others",
        f"{there}, {slots} slots",
        f"{'not shared' if answer['missing'] else 'shared'}, {free / GIB:,.0f} GiB free",
        f"{ahead:+.1f} s" if ahead else f"±{answer['heard'] - answer['asked']:.1f} s",
        problems=tuple(problems),
    )


def _ahead(answer: Mapping[str, Any]) -> float:
    """Seconds by which a host's clock is ahead of this one's at least, negative if behind: 0 where it lies
    between asking and hearing, of which it may be any moment.
    """
    asked, there, heard = answer["asked"], answer["time"], answer["heard"]
    return float(max(0.0, there - heard) or min(0.0, there - asked))


def _met(rows: Sequence[HostRow], answers: Mapping[str, Mapping[str, Any]]) -> list[HostRow]:
    """The rows with what came of an all-reduce over one rank on each host that answers.

    Args:
        answers: {host: what it answered to the probe}, in the order of the hostfile.
    """
    if len(answers) < 2:
        return list(rows)
    first = next(iter(answers))
    place = {"address": answers[first]["address"] or first, "port": answers[first]["port"]}
    questions = [
        {**place, "rank": rank, "ranks": len(answers), "seconds": REACH_SECONDS}
        for rank in range(len(answers))
    ]
    # Python and torch may come from a slow file system, and a rank takes twice REACH_SECONDS at most.
    found = ask_all(tuple(answers), meeting, questions, ANSWER_SECONDS + 2 * REACH_SECONDS)
    met = dict(zip(answers, found, strict=True))
    absent = [host for host, what in met.items() if isinstance(what, str) or not what["reached"]]
    where = f"{first}, address {place['address']}, port {place['port']}"
    return [_met_row(row, met[row.host], absent, where) if row.host in met else row for row in rows]


def _met_row(row: HostRow, found: Mapping[str, Any] | str, absent: Sequence[str], where: str) -> HostRow:
    if isinstance(found, str):
        return replace(row, meets="no", problems=(*row.problems, found))
    backend, why = found["backend"], found["why"]
    if not why:
        return replace(row, meets=f"{backend}, {1000 * found['seconds']:.1f} ms")
    if not found["reached"]:
        problem = (
            f"{row.host}: it does not reach rank 0 on {where} ({why}). Open ports {PORTS.start} to "
            f"{PORTS.stop - 1} between the hosts, or name another address of that host by --master_addr and "
            "an open port by --master_port."
        )
    elif absent:
        problem = f"{row.host}: its all-reduce by {backend} waited for {', '.join(absent)}: see there."
    else:
        problem = (
            f"{row.host}: an all-reduce by {backend} over the hosts fails ({why}). Let the hosts connect to "
            "all ports of each other, and name the interface between them by NCCL_SOCKET_IFNAME, "
            "GLOO_SOCKET_IFNAME or your backend's variable."
        )
    return replace(row, meets=f"{backend}: no", problems=(*row.problems, problem))
