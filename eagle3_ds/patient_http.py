"""JSON from a server over HTTP, patiently: what may pass is tried again, what cannot is told at once.

Every room may use this; it uses none.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

Answer = TypeVar("Answer")

TRIES = 6
"""How often one request is sent before it counts as failed."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try, and at most before any, also where the server asks for more; they double
from try to try.
"""
SHOWN = 300
"""Characters of a server's own message that are shown."""


@dataclass(frozen=True)
class Words:
    """How the user named a server, and what else of it is the user's to set: the words of all messages.

    Attributes:
        server: what stands before the URL, as a command line or a recipe has it.
        timeout: the setting of how long an answer may take.
        key_variable: the environment variable that holds the server's key; None sends no key.
        key_setting: where the name of that variable is set; "" where it is always the same.
        otherwise: what can be done instead of starting a server at the URL; "" or ", ...".
        then: what the same command does once the server is there.
    """

    server: str = "--server"
    timeout: str = "--timeout"
    key_variable: str | None = "OPENAI_API_KEY"
    key_setting: str = ""
    otherwise: str = ""
    then: str = "goes on where it stopped"


COMMAND_LINE = Words()


class ServerGoneError(ValueError):
    """Nothing more can be got from this server: the run ends, and can go on later."""


class NoAnswerError(ValueError):
    """The server refuses this one request, and would refuse it again."""


class ServerTroubleError(NoAnswerError):
    """The server did not manage this one request, however often it was asked; another time it may."""


class HalfAnswerError(Exception):
    """What came is not whole. Raised by a function that reads an answer, which is then asked for again."""


class PatientClient:
    """Sends requests to one server. Threads may share it.

    Args:
        url: such as http://host:8000, with or without /v1.
        connections: requests in flight at most; None leaves that to the callers.
        timeout: seconds to wait for an answer.
        words: of messages. The value of `words.key_variable`, if it is set, goes along as the bearer token,
            and nowhere else.
        require_alive: called before a request is tried again; raises ValueError when the server is known to
            be dead.

    Raises:
        ValueError: the URL is none, or holds a user name, a password or a query.
    """

    def __init__(
        self,
        url: str,
        connections: int | None,
        timeout: float,
        words: Words = COMMAND_LINE,
        require_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.url = _base(url, words)
        self.words = words
        self.require_alive = require_alive
        self.stopped = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._key = os.environ.get(words.key_variable, "").strip() if words.key_variable else ""
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def stop(self) -> None:
        """Try nothing again, and let every thread that waits for the server end at once."""
        self.stopped.set()
        for one in list(self._sockets):
            with suppress(OSError):  # closed already
                one.shutdown(socket.SHUT_RDWR)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], Answer],
        tries: int = TRIES,
        is_text: bool = False,
    ) -> Answer:
        """What `read` makes of the answer's JSON, or with `is_text` of its text.

        `read` may raise HalfAnswerError, and the request is sent again; a KeyError, IndexError, TypeError or
        AttributeError says that the answer has another form than it should. Any other error of `read` ends
        this.

        Raises:
            NoAnswerError: the server refuses the request, or (ServerTroubleError) all tries failed.
            ServerGoneError: the server cannot be reached, or refuses every request.
        """
        trouble, is_gone, wait = "", False, 0.0
        for number in range(tries):
            if number:
                pause = min(LONGEST_WAIT, max(wait, FIRST_WAIT * 2 ** (number - 1)))
                if self.stopped.wait(pause):
                    break
                self.require_alive()
            wait, is_gone = 0.0, False
            try:
                response = self._client.request(
                    method, f"{self.url}{path}", json=body, extensions={"trace": self._trace}
                )
                if response.status_code in (408, 429) or response.status_code >= 500:
                    trouble = f"says {self._status(response)}"
                    wait = _retry_after(response)
                else:
                    self._check_status(path, response)
                    return read(response.text if is_text else _json(response))
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                trouble, is_gone = f"cannot be reached ({self._shown(str(error))})", True
            except httpx2.TimeoutException:
                trouble = f"does not answer in time ({self.words.timeout})"
            except httpx2.HTTPError as error:
                trouble = f"broke off its answer ({self._shown(str(error)) or type(error).__name__})"
            except HalfAnswerError as error:
                trouble = f"gave half an answer ({self._masked(str(error))})"
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                trouble = f"gave an answer of another form ({type(error).__name__}: {error})"
        self.require_alive()
        if is_gone:
            raise ServerGoneError(
                f"{self.words.server} {self.url} {trouble}. Start it, or correct the URL"
                f"{self.words.otherwise}; the same command then {self.words.then}."
            )
        raise ServerTroubleError(f"the server {trouble}; tried {tries} times")

    def _trace(self, event: str, told: Mapping[str, Any]) -> None:
        """Keeps the sockets of all connections, by which `stop` wakes those who wait."""
        if event.endswith("connect_tcp.complete"):
            self._sockets.add(told["return_value"].get_extra_info("socket"))

    def _check_status(self, path: str, response: httpx2.Response) -> None:
        status, words = response.status_code, self.words
        if status in (401, 403):
            raise ServerGoneError(
                f"{words.server} {self.url} asks for a key ({status}), and {self._key_advice()}"
            )
        if status in (404, 405):
            raise ServerGoneError(
                f"{words.server} {self.url}{path}: {self._status(response)}. Name the root of an "
                "OpenAI-compatible server, such as http://host:8000, and a model that it serves."
            )
        if not response.is_success:
            raise NoAnswerError(f"the server refuses the request: {self._status(response)}")

    def _key_advice(self) -> str:
        """What is wrong with the key, and where it is set."""
        words = self.words
        if words.key_variable is None:
            return f"{words.key_setting} is null. Put the key into a variable, and the variable's name there."
        hint = "is not accepted" if self._key else "is not set"
        named = f" of {words.key_setting}" if words.key_setting else ""
        return f"the environment variable {words.key_variable}{named} {hint}. Set it to the server's key."

    def _status(self, response: httpx2.Response) -> str:
        """The status and the server's own message."""
        try:
            text = response.json()
            for key in ("error", "message"):
                text = text.get(key, text) if isinstance(text, dict) else text
        except ValueError:
            text = response.text
        return f"{response.status_code} {self._shown(str(text))}".strip()

    def _shown(self, text: str) -> str:
        """Text of others, on one line and not too long."""
        return " ".join(self._masked(text).split())[:SHOWN]

    def _masked(self, text: str) -> str:
        """Text without the key, should a server send it back."""
        return text.replace(self._key, "***") if self._key else text


def _json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise HalfAnswerError(str(error)) from error


def _base(url: str, words: Words) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise ValueError(f"{words.server} is {url!r}, which is no URL. Write it as http://host:8000.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        where = words.key_setting or f"the environment variable {words.key_variable}"
        raise ValueError(
            f"{words.server} holds a user name, a password, a query or a fragment, which messages would "
            f"show. Write it as http://host:8000, and give a key by {where}."
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date
        return 0.0
