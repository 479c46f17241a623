"""Another package in a process of its own, by another Python, that answers questions (block_peers.py)."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_TAIL = 3000
_PATIENCE = 60.0


class PeerError(RuntimeError):
    """The package raised, or its process ended."""


class Peer:
    """The process of one package. `with Peer(python, "speculators", 2, log) as peer: peer.ask("run")`."""

    def __init__(self, python: str, package: str, threads: int, log: Path) -> None:
        """Start it by the program `python`, whose environment has the package; what it prints goes to
        `log`.
        """
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._package, self._log = package, log
        command = [python, "-m", "judge.block_peers", package, str(threads)]
        pipe = subprocess.PIPE
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, stderr=stream, text=True
            )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            PeerError: with the package's own message, or with the end of its log where the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"what": what, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""  # Its end is told below.
        if not line:
            code = self._process.wait()
            raise PeerError(f"{self._package} ended with {code}: {self._log.read_text()[-_TAIL:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process: it stops at the end of its questions."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # Of one that has ended before it read everything.
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
