"""Asking a server for the hidden states of documents, one request each, with a limited number of tries.

The answer to a request names a file in a folder that both sides see (`connector` writes it); it is read,
checked and removed. Nothing here knows of stores.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from eagle3_ds.serving.rows import DamagedRowsError, Expected, RowFile, ServedRows, read_rows

Result = TypeVar("Result")

PREFIX = "eagle3_ds_prefix"
ROWS_FILE = "eagle3_ds_rows"
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the second try, and at most before any; they double from try to try."""
SHORT_DELAY, LONG_DELAY = 0.002, 0.1
"""Seconds between two looks for a file that the server is about to write."""


class StoppedError(Exception):
    """The client was stopped while a thread waited."""


class _TryAgainError(Exception):
    """What may go better at the next try; the text is the reason."""


class ServerClient:
    """A client of one server; its methods may be called by many threads at once.

    Args:
        url: of the server, for example http://127.0.0.1:8000.
        folder: where the server's connector writes, as this host sees it.
        prefix: how the names of this client's files begin: letters, digits and dashes.
        timeout: seconds for one try, from the request to the last byte of the file.
        retries: how often a request is tried again.
        key: the server's API key; it is sent and never shown.
        require_alive: raises ValueError when the server is known to be dead.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        prefix: str,
        timeout: float,
        retries: int,
        key: str | None = None,
        require_alive: Callable[[], None] = lambda: None,
    ) -> None:
        assert re.fullmatch(r"[A-Za-z0-9-]+", prefix), prefix
        self.url = url.rstrip("/").removesuffix("/v1")
        self.folder, self.prefix, self.timeout, self.retries = folder, prefix, timeout, retries
        self.require_alive = require_alive
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._model = ""
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._stopped = threading.Event()

    def connect(self) -> int:
        """Find the server and its model, and remove files that an earlier client with this prefix left.

        Returns:
            The longest length, prompt and answer together, that the server takes.

        Raises:
            ValueError: no server answers, or it is none of vLLM's.
        """
        if not self.folder.is_dir():
            raise ValueError(
                f"target.server.folder = {str(self.folder)!r} is no folder here: name the one that the "
                "server's connector writes to, on a file system that both hosts share."
            )
        for leftover in self.folder.glob(f"{self.prefix}-*"):
            leftover.unlink()
        try:
            models = self._exchange("GET", "/v1/models")["data"]
            self._model, longest = str(models[0]["id"]), int(models[0]["max_model_len"])
        except _TryAgainError as error:
            raise ValueError(
                f"target.server.url = {self.url!r}: no server answers ({error}). Start vLLM there, correct "
                "the "
                "URL, or set it to null to have the server started by this run."
            ) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, ValueError) and str(error).startswith("target.server"):
                raise
            raise ValueError(
                f"target.server.url = {self.url!r}: what answers there lists no model with max_model_len, as "
                f"vLLM does ({error!r}). Name the URL of a vLLM server."
            ) from error
        return longest

    def rows(self, token_ids: Sequence[int], expected: Expected) -> ServedRows:
        """The checked hidden states of a document.

        Raises:
            ValueError: the server refuses, gives other rows than those of this document and this target, or
                fails at every try.
            StoppedError: `stop` was called.
        """

        def take(path: Path, chosen: int | None) -> ServedRows:
            return ServedRows(read_rows(path, token_ids, expected), chosen)

        return self._ask(token_ids, take)

    def file(self, token_ids: Sequence[int], expected: Expected, place: Path) -> None:
        """Have the hidden states of a document put to `place`, in `folder`, whole or not at all. Their rows
        are not read here.

        Raises:
            As `rows`; a damaged row is found by those who read it.
        """

        def take(path: Path, _: int | None) -> None:
            RowFile(path, expected).require_tokens(token_ids)
            path.replace(place)

        self._ask(token_ids, take)

    def _ask(self, token_ids: Sequence[int], take: Callable[[Path, int | None], Result]) -> Result:
        """What `take` makes of the document's file and of the token that the server chose after it."""
        delay = FIRST_DELAY
        for left in range(self.retries, -1, -1):
            try:
                return self._try(token_ids, take)
            except (_TryAgainError, DamagedRowsError) as error:
                reason = str(error)
            if self._stopped.is_set():
                raise StoppedError
            self.require_alive()
            if left and self._stopped.wait(delay):
                raise StoppedError
            delay = min(2 * delay, LONGEST_DELAY)
        raise ValueError(
            f"the server at {self.url} failed {self.retries + 1} times at a document of {len(token_ids)} "
            "tokens; "
            f"last: {reason}. See the server's log, then run the same command again: it goes on after the "
            "documents that are done. More tries: target.server.retries; more time for one: "
            "target.server.timeout_seconds."
        )

    def stop(self) -> None:
        """Let every thread that waits for the server end soon."""
        self._stopped.set()
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(2)

    def _try(self, token_ids: Sequence[int], take: Callable[[Path, int | None], Result]) -> Result:
        deadline = time.monotonic() + self.timeout
        body = {
            "model": self._model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            "kv_transfer_params": {PREFIX: self.prefix},
        }
        answer = self._exchange("POST", "/v1/completions", body)
        name = (answer.get("kv_transfer_params") or {}).get(ROWS_FILE)
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"the server at {self.url} answers and writes no hidden states: it runs without this "
                "program's "
                "connector. Start it as docs/hidden-states.md shows, or set target.server.url to null."
            )
        path = self._wait_for(name, deadline)
        chosen = (answer.get("choices") or [{}])[0].get("token_ids")
        try:
            return take(path, int(chosen[0]) if chosen else None)
        finally:
            path.unlink(missing_ok=True)

    def _wait_for(self, name: str, deadline: float) -> Path:
        """The path of the file of this name, once it is complete."""
        path, failed = self.folder / f"{name}.safetensors", self.folder / f"{name}.failed"
        delay = SHORT_DELAY
        while not path.is_file():
            if failed.is_file():
                reason = failed.read_text() or "no reason given"
                failed.unlink(missing_ok=True)
                if "No space left" in reason:
                    raise ValueError(
                        f"the server could not write hidden states ({reason}): free some space in "
                        f"target.server.folder ({self.folder}), or lower target.server.concurrency. Then "
                        "run the "
                        "same command again: it goes on after the documents that are done."
                    )
                raise _TryAgainError(f"the server could not write hidden states ({reason})")
            if time.monotonic() > deadline:
                raise _TryAgainError(
                    f"{path} did not appear in {self.timeout:g} s: the server's connector must write to the "
                    "folder "
                    "of target.server.folder, on a file system that both hosts share"
                )
            self.require_alive()
            if self._stopped.wait(delay):
                raise StoppedError
            delay = min(2 * delay, LONG_DELAY)
        return path

    def _exchange(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One request; returns the JSON of the answer.

        Raises:
            _TryAgainError: no connection, or an answer that may be another next time.
            ValueError: the server refuses the request.
        """
        try:
            connection = self._connection()
            connection.request(
                method, urlsplit(self.url).path + path, json.dumps(body) if body else None, self._headers
            )
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return _json_object(text)
        reason = f"status {status}: {text[:500].decode(errors='replace')}"
        if status >= 500 or status in (408, 429):
            raise _TryAgainError(reason)
        if status in (401, 403):
            raise ValueError(
                f"target.server.url = {self.url!r} refuses the API key (status {status}): put the key into "
                "an "
                "environment variable, and that variable's name into target.server.key_variable."
            )
        raise ValueError(f"the server at {self.url} refuses the request ({reason})")

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection, which is kept between requests."""
        if getattr(self._own, "connection", None) is None:
            parts = urlsplit(self.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._own.connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
            self._open.add(self._own.connection)
        return self._own.connection

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._open.discard(connection)
            self._own.connection = None


def api_key(variable: str | None) -> str | None:
    """The value of the environment variable of this name.

    Raises:
        ValueError: it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(
            f"target.server.key_variable = {variable!r}: this environment variable is not set. Set it to the "
            "server's API key, or remove key_variable."
        )
    return key


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _TryAgainError(f"an answer that is no JSON: {text[:200]!r}") from error
    if not isinstance(found, dict):
        raise _TryAgainError(f"an answer that is no JSON object: {text[:200]!r}")
    return found
