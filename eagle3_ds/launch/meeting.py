"""The program by which hosts try whether they reach the first one, as ranks will. Like `probe.py` its text is
sent through ssh, so only the standard library is imported.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

# The ports that a run takes its own from.
PORTS = range(20_000, 30_000)
TRIES = 100


def main_address(name: str) -> str:
    """The address of this host that DeepSpeed gives to the ranks: the first that `hostname -I` tells, or the
    name by which the hostfile knows it.
    """
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5, check=True)
        if told.stdout.split():
            return told.stdout.split()[0]
    return name


def listen(name: str, visitors: int, seconds: float) -> None:
    """Listen on a free port, print where as JSON, and end after so many visitors or seconds."""
    address = main_address(name)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with _server(family) as server:
        print(json.dumps({"address": address, "port": server.getsockname()[1]}), flush=True)
        end = time.monotonic() + seconds
        for _ in range(visitors):
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                server.accept()[0].close()
            except TimeoutError:
                return


def _server(family: int) -> socket.socket:
    for port in random.SystemRandom().sample(PORTS, TRIES):
        with suppress(OSError):
            return socket.create_server(("", port), family=family)
    raise OSError(f"none of {TRIES} ports from {PORTS.start} on is free")


def visit(name: str, address: str, port: int, seconds: float) -> dict[str, Any]:
    """Resolve the first host's name and connect to its address.

    Returns:
        `unresolved` and `unreached`: why not, each empty if it went well; `seconds` that connecting took.
    """
    unresolved = unreached = ""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        unresolved = str(error)
    began = time.monotonic()
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except OSError as error:
        unreached = str(error)
    return {"unresolved": unresolved, "unreached": unreached, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked.pop("listens"):
        listen(**asked)
    else:
        print(json.dumps(visit(**asked)))
