"""How vLLM runs beside the tests: one thread, a small cache, nothing from a network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 300
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def vllm(
    python: str, target: Path, folder: Path, *arguments: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """URL and process of a server of the target, which leads a group of its own. Its log goes to `folder`,
    `arguments` are further words of its command.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]
    line += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_CPU
    log = folder / f"vllm-{port}.log"
    with open(log, "wb") as stream:
        line += ["--max-num-seqs", "8", *arguments]
        process = subprocess.Popen(
            line, cwd=folder, env=clean, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        kill(process)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"{url}/health", timeout=5)
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
