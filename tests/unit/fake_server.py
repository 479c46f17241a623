"""A server that answers as vLLM does with our connector or with its own, from a function, and misbehaves as a
test wants.
"""

from __future__ import annotations

import fcntl
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.store.rows import row_checksums

States = Callable[[list[int]], tuple[Tensor, int]]
"""From token ids to hidden states [n, S, H] and the next token."""


@dataclass
class FakeServer:
    """What the server does, and what it saw.

    Attributes:
        about: the metadata of its files.
        alter: changes what a file will hold, {name: tensor}, in place.
        spoil: called with the path of each file before its name is told; may damage it.
        answer: changes the JSON of an answer in place.
        status, reason: of all answers to completions, unless 200.
        failures: so many requests get status 503 first.
        key: refuse requests without it.
        is_stock: answer as with vLLM's own connector: `about` is not written, and no checksums.
    """

    folder: Path
    states: States
    about: dict[str, str]
    longest: int = 512
    alter: Callable[[dict[str, Tensor]], object] = lambda tensors: None
    spoil: Callable[[Path], object] = lambda path: None
    answer: Callable[[dict[str, Any]], object] = lambda answer: None
    models: object = None
    status: int = 200
    reason: str = ""
    failures: int = 0
    key: str | None = None
    is_stock: bool = False
    port: int = 0
    asked: list[list[int]] = field(default_factory=list)
    before: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Serve while the block runs, at the port of the first time."""
        server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            server.cut()
            thread.join()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Write the file of a request; returns the answer."""
        token_ids = body["prompt"]
        self.asked.append(token_ids)
        self.before()
        hidden, token = self.states(token_ids)
        tensors = {"token_ids": torch.tensor(token_ids), "hidden_states": hidden}
        choices = {"choices": [{"token_ids": [token]}]}
        write = self._write_stock if self.is_stock else self._write
        answer = choices | {"kv_transfer_params": write(body, tensors)}
        self.answer(answer)
        return answer

    def _write(self, body: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """As our connector writes."""
        name = f"{body['kv_transfer_params']['eagle3_ds_prefix']}-request-{len(self.asked)}-{id(body)}"
        tensors["row_crc32"] = row_checksums(tensors["hidden_states"].flatten(1))
        self.alter(tensors)
        aside = self.folder / f".{name}"
        save_file(tensors, aside, metadata=self.about)
        path = aside.rename(self.folder / f"{name}.safetensors")
        self.spoil(path)
        return {"eagle3_ds_rows": name}

    def _write_stock(self, body: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """As vLLM's ExampleHiddenStatesConnector writes, at the place where it does."""
        path = self.folder / f"cmpl-{body['request_id']}-0-{id(body):x}.safetensors"
        self.alter(tensors)
        with open(f"{path}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            save_file(tensors, path)
        self.spoil(path)
        return {"hidden_states_path": str(path)}


class _Server(ThreadingHTTPServer):
    """Knows its connections, so that a server that stops cuts them as a killed one does."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        found = super().get_request()
        self.connections.append(found[0])
        return found

    def handle_error(self, *arguments: Any) -> None:
        """A connection that was cut is no news."""

    def cut(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

        def _send(self, status: int, content: object) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:  # noqa: N802
            if fake.key is not None and self.headers["Authorization"] != f"Bearer {fake.key}":
                return self._send(401, {})
            models = {"data": [{"id": "tiny", "max_model_len": fake.longest}]}
            return self._send(200, models if fake.models is None else fake.models)

        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.failures:
                fake.failures -= 1
                return self._send(503, {})
            if fake.status != 200:
                fake.asked.append(body["prompt"])
                return self._send(fake.status, {"error": fake.reason})
            return self._send(200, fake.complete(body))

    return Handler
