"""The program that checks a host before ranks start there. Its text is sent through ssh and run by the host's
Python, on which this project may not be installed: only the standard library is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

# Below the ports that operating systems give to outgoing connections: such a connection could take the port
# before the ranks start, which may be long after it was chosen.
PORTS = range(20_000, 30_000)
_TRIES = 100


def code_digest(folder: Path) -> str:
    """A digest of the names and contents of all Python files below a folder."""
    value = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        value.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return value.hexdigest()[:16]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer a question about this host.

    Args:
        question: the packages, the folder of the code, files that must exist, a folder whose disk is looked
            at, and for the first host a port that must be free and an address that must be its own, else
            null.

    Returns:
        `versions` of the packages and the code, the files that are `missing`, whether the port is `free`,
        whether the address is its `own`; `devices` by kind, `cores`, `disk_free` in bytes; the `address`
        and a free `port` at which a rank 0 here would be reached; and the `time` here, in seconds since 1970,
        at the end.
    """
    code = Path(question["code"])
    versions = {"Python": platform.python_version()}
    versions.update({package: _version(package) for package in question["packages"]})
    versions["code of eagle3_ds"] = code_digest(code) if code.is_dir() else "not there"
    missing = [path for path in question["paths"] if not Path(path).exists()]
    free = question["port"] is None or is_free(question["port"])
    own = question["address"] is None or is_here(question["address"])
    return {
        "versions": versions,
        "missing": missing,
        "free": free,
        "own": own,
        "devices": devices(),
        "cores": len(os.sched_getaffinity(0)),
        "disk_free": disk_free(Path(question["disk"])),
        "address": main_address(),
        "port": free_port(),
        "time": time.time(),
    }


def devices() -> dict[str, int]:
    """{kind: how many}, by the files of their drivers; empty where there are none."""
    found = {
        name: sum(path.name.removeprefix(name).isdigit() for path in Path("/dev").glob(f"{name}*"))
        for name in ("nvidia", "davinci")
    }
    return {name: count for name, count in found.items() if count}


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest folder above it that exists."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main_address() -> str:
    """The address of this host that DeepSpeed gives to the ranks: the first that `hostname -I` tells; empty
    where it tells none.
    """
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5, check=True)
        return next(iter(told.stdout.split()), "")
    return ""


def free_port() -> int:
    """A TCP port on which nobody listens now, so that two runs on one machine have different ones."""
    for port in random.SystemRandom().sample(PORTS, _TRIES):
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens on a TCP port."""
    with socket.socket() as probe:
        # Ignores connections of an ended run in TIME_WAIT, but not a process that listens.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's: whether one of its addresses can be bound here."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_can_listen(family, address[0]) for family, _, _, _, address in found)


def _can_listen(family: int, address: str | int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
