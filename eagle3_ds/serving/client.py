"""Asking a server for the hidden states of documents, one request each, with a limited number of tries.

The answer to a request names a file in a folder that both sides see (`written`); it is read, checked and
removed. Nothing here knows of stores.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from eagle3_ds.patient_http import (
    HalfAnswerError,
    NoAnswerError,
    PatientClient,
    ServerGoneError,
    ServerTroubleError,
    Words,
)
from eagle3_ds.serving.rows import DamagedRowsError, Expected, RowFile, ServedRows, read_rows
from eagle3_ds.serving.written import WrittenFile, written_file

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

PREFIX = "eagle3_ds_prefix"
SHORT_DELAY, LONG_DELAY = 0.002, 0.1
"""Seconds between two looks for a file that the server is about to write."""


class StoppedError(Exception):
    """The client was stopped while a thread waited."""


class ServerClient:
    """A client of one server; its methods may be called by many threads at once.

    Args:
        url: of the server, for example http://127.0.0.1:8000.
        folder: where the server's connector writes, as this host sees it.
        prefix: how the names of this client's files begin: letters, digits and dashes.
        timeout: seconds that an answer may take, and then its file.
        retries: how often a request is tried again.
        key_variable: the environment variable that holds the server's API key, which is sent and never shown.
        require_alive: raises ValueError when the server is known to be dead.
        warns: say once when the server's connector is vLLM's own, of which less can be checked.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        prefix: str,
        timeout: float,
        retries: int,
        key_variable: str | None = None,
        require_alive: Callable[[], None] = lambda: None,
        warns: bool = True,
    ) -> None:
        assert re.fullmatch(r"[A-Za-z0-9-]+", prefix), prefix
        self.folder, self.prefix, self.timeout, self.retries = folder, prefix, timeout, retries
        words = Words(
            "target.server.url",
            "target.server.timeout_seconds",
            key_variable,
            "target.server.key_variable",
            ", or set it to null to have the server started by this run",
            "goes on after the documents that are done",
        )
        self._http = PatientClient(url, None, timeout, words, require_alive)
        self.url = self._http.url
        self._model = ""
        self._warnings = threading.Semaphore(int(warns))

    def connect(self) -> int:
        """Find the server and its model, and remove files that an earlier client with this prefix left.

        Returns:
            The longest length, prompt and answer together, that the server takes.

        Raises:
            ValueError: no server answers, or it is none of vLLM's; or the folder is missing, or not writable.
        """
        if not self.folder.is_dir():
            raise ValueError(
                f"target.server.folder = {str(self.folder)!r} is no folder here: name the one that the "
                "server's connector writes to, on a file system that both hosts share."
            )
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise ValueError(
                f"target.server.folder = {str(self.folder)!r}: this user may not read it, or not remove "
                "files from it, which is done as soon as they are read. Run the server and this program as "
                "the same user."
            )
        for leftover in (*self.folder.glob(f"{self.prefix}-*"), *self.folder.glob(f"cmpl-{self.prefix}-*")):
            leftover.unlink(missing_ok=True)
        try:
            self._model, longest = self._http.request("GET", "/v1/models", None, _read_model, tries=1)
        except NoAnswerError as error:
            raise ValueError(
                f"target.server.url {self.url}: its list of models is not vLLM's, which has max_model_len: "
                f"{error}. Name the URL of a vLLM server that is ready."
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

        return self._ask(token_ids, expected, take)

    def file(self, token_ids: Sequence[int], expected: Expected, place: Path) -> None:
        """Have the hidden states of a document put to `place`, in `folder`, whole or not at all. Their rows
        are not read here.

        Raises:
            As `rows`; a damaged row is found by those who read it.
        """

        def take(path: Path, _: int | None) -> None:
            RowFile(path, expected).require_tokens(token_ids)
            path.replace(place)

        self._ask(token_ids, expected, take)

    def stop(self) -> None:
        """Let every thread that waits for the server end soon."""
        self._http.stop()

    def _ask(
        self, token_ids: Sequence[int], expected: Expected, take: Callable[[Path, int | None], Result]
    ) -> Result:
        """What `take` makes of the document's file and of the token that the server chose after it."""
        body = {
            "model": self._model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            "kv_transfer_params": {PREFIX: self.prefix},
            # vLLM's own connector calls its file cmpl-ID-...: `connect` finds what a killed client left.
            "request_id": f"{self.prefix}-{uuid4().hex}",
        }

        def read(answer: Any) -> Result:
            written = written_file(answer, self.folder, self.url)
            if written.is_stock and self._warnings.acquire(blocking=False):
                logger.warning(_unchecked(self.url, expected))
            return self._taken(answer, written, take)

        try:
            return self._http.request("POST", "/v1/completions", body, read, tries=self.retries + 1)
        except (ServerTroubleError, ServerGoneError) as error:
            if self._http.stopped.is_set():
                raise StoppedError from error
            if isinstance(error, ServerGoneError):
                raise
            raise ValueError(
                f"a document of {len(token_ids)} tokens: {error}. See the log of {self.url}, then run the "
                "same command again: it goes on after the documents that are done. More tries: "
                "target.server.retries; more time for one: target.server.timeout_seconds."
            ) from error

    def _taken(self, answer: Any, written: WrittenFile, take: Callable[[Path, int | None], Result]) -> Result:
        """What `take` makes of the file that an answer names, which is removed then."""
        self._wait_for(written)
        chosen = (answer.get("choices") or [{}])[0].get("token_ids")
        try:
            return take(written.path, int(chosen[0]) if chosen else None)
        except DamagedRowsError as error:
            raise HalfAnswerError(str(error)) from error
        finally:
            written.remove()

    def _wait_for(self, written: WrittenFile) -> None:
        """Return once the file is complete."""
        deadline, delay = time.monotonic() + self.timeout, SHORT_DELAY
        while not written.is_complete():
            if time.monotonic() > deadline:
                raise HalfAnswerError(written.too_late(self.timeout))
            self._http.require_alive()
            if self._http.stopped.wait(delay):
                raise StoppedError
            delay = min(2 * delay, LONG_DELAY)


def _unchecked(url: str, expected: Expected) -> str:
    """What is said of a server with vLLM's own connector."""
    return (
        f"the server at {url} writes hidden states by vLLM's ExampleHiddenStatesConnector, whose files say "
        "neither of which layers nor of which weights they are and have no checksums. Not checked: that its "
        f"eagle_aux_hidden_state_layer_ids are {list(expected.layer_ids)}, a flipped bit, steps whose hidden "
        "states vLLM leaves out (it does when any request reaches --max-model-len: serve nothing else); the "
        "weights are told apart by a few of the tokens that the server chooses, if at all. This program's "
        "connector writes all that: docs/hidden-states.md."
    )


def _read_model(answer: Any) -> tuple[str, int]:
    """The name and the longest length of a server's model."""
    model = answer["data"][0]
    return str(model["id"]), int(model["max_model_len"])


def require_key(variable: str | None) -> None:
    """Raises ValueError where the environment variable of this name is not set."""
    if variable is not None and not os.environ.get(variable):
        raise ValueError(
            f"target.server.key_variable = {variable!r}: this environment variable is not set. Set it to the "
            "server's API key, or remove key_variable."
        )
