"""A vLLM server of our own on this host's loopback: started with our connector, stopped on every way out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from eagle3_ds.config.target import ServerSection

CONNECTOR = Path(__file__).with_name("connector.py")
MODULE, CLASS = "eagle3_ds_connector", "RowsConnector"
LOG_LINES = 15
STOP_SECONDS = 30.0
"""How long a server may take to end before it is killed."""
_PROGRAM = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
# prctl(PR_SET_PDEATHSIG, SIGTERM) outlives exec: Linux ends the server when this process is killed.
_WITH_PARENT = [sys.executable, "-c", _PROGRAM] if sys.platform == "linux" else []


@dataclass(frozen=True)
class OwnServer:
    """A running server.

    Attributes:
        folder: where it writes hidden states.
        require_alive: raises ValueError with its last words when it has ended.
    """

    url: str
    folder: Path
    require_alive: Callable[[], None]


def connector_arguments(layer_ids: Sequence[int], folder: Path) -> list[str]:
    """The words for `vllm serve` that make it write hidden states; also for servers that others start."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}},
    }
    transfer = {
        "kv_connector": CLASS,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"folder": str(folder)},
    }
    return [
        "--no-enable-prefix-caching",
        "--speculative-config",
        json.dumps(speculative),
        "--kv-transfer-config",
        json.dumps(transfer),
    ]


def server_command(section: ServerSection, model: Path) -> list[str]:
    """The program that serves `model`.

    Raises:
        ValueError: there is no such Python, or no `vllm` on PATH.
    """
    if section.python is not None:
        python = shutil.which(os.path.expanduser(section.python))
        if python is None:
            raise ValueError(
                f"target.server.python = {section.python!r} is no program here: name the Python of the "
                "environment that has vLLM."
            )
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    vllm = shutil.which("vllm")
    if vllm is None:
        raise ValueError(
            "target.capture is server, and there is no `vllm` on PATH: install vLLM, name the Python that "
            "has it "
            "in target.server.python, or a running server in target.server.url."
        )
    return [vllm, "serve", str(model)]


@contextlib.contextmanager
def own_server(
    section: ServerSection, model: Path, dtype: str, layer_ids: Sequence[int], longest: int, log: Path
) -> Iterator[OwnServer]:
    """Serve `model` while the block runs. The server and all its processes end with the block, and with this
    process even when that is killed.

    Args:
        longest: tokens of the longest document.
        log: the file that gets what the server says.

    Raises:
        ValueError: vLLM is missing, or the server ends or is not ready in `start_seconds`.
    """
    command = server_command(section, model)
    with tempfile.TemporaryDirectory(prefix="eagle3-ds-", dir=section.folder) as place:
        modules, rows = Path(place, "modules"), Path(place, "rows")
        modules.mkdir()
        rows.mkdir()
        shutil.copyfile(CONNECTOR, modules / f"{MODULE}.py")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        # A prompt of the longest length leaves vLLM no room for its answer: it gets one more position, which
        # no forward ever reads.
        own = {"host": "127.0.0.1", "port": port, "dtype": dtype, "max-model-len": longest + 1}
        command += [f"--{name}={value}" for name, value in own.items()]
        command += [*connector_arguments(layer_ids, rows), *section.arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=_environment(modules),
                start_new_session=True,
            )
        try:

            def require_alive() -> None:
                if process.poll() is not None:
                    raise ValueError(_last_words(process.returncode, log))

            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, section.start_seconds, log, require_alive)
            yield OwnServer(url, rows, require_alive)
        finally:
            _stop(process)


def _environment(modules: Path) -> dict[str, str]:
    """This process's variables, without an API key, which a server of loopback needs not; Python looks for
    modules in the connector's folder first.
    """
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    paths = [str(modules), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


def _wait_until_ready(url: str, seconds: float, log: Path, require_alive: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while True:
        require_alive()
        with contextlib.suppress(OSError), urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > deadline:
            raise ValueError(
                f"the server is not ready after {seconds:g} s: see {log}, or raise "
                "target.server.start_seconds."
            )
        time.sleep(0.2)


def _last_words(status: int, log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return (
        f"the server {ended}; nothing that is on disk is lost, the same command goes on after it. See "
        f"{log}; its "
        "last lines:\n  " + "\n  ".join(lines)
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process of its session, also those that it left behind when it died."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
