"""JSON from a server over HTTP, patiently: what may pass is tried again, what cannot is told at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

Answer = TypeVar("Answer")

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6
"""How often one request is sent before it counts as failed."""
LONGEST_WAIT = 60.0
"""Seconds at most between two tries, also where the server asks for more."""
SHOWN = 300
"""Characters of a server's own message that are shown."""


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

    The environment variable OPENAI_API_KEY, if it is set, goes along as the bearer token, and nowhere else.

    Args:
        url: such as http://host:8000, with or without /v1.
        connections: requests in flight at most.
        timeout: seconds to wait for an answer.
        first_wait: seconds before the second try; doubled before each further one.
        goes_on: whether a command that lost its server goes on where it stopped, which its message then says.

    Raises:
        ValueError: the URL is none, or holds a user name, a password or a query.
    """

    def __init__(
        self, url: str, connections: int, timeout: float, first_wait: float = 1.0, goes_on: bool = True
    ) -> None:
        self.url = _base(url)
        self.first_wait = first_wait
        self.goes_on = goes_on
        self.stopped = threading.Event()
        """Set when the run ends: nothing is tried again then."""
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

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

        `read` may raise HalfAnswerError; a KeyError, TypeError or AttributeError says that the answer has
        another form than it should.

        Raises:
            NoAnswerError: the server refuses the request, or (ServerTroubleError) all tries failed.
            ServerGoneError: the server cannot be reached, or refuses every request.
        """
        trouble, is_gone, wait = "", False, 0.0
        for number in range(tries):
            if number and self.stopped.wait(
                min(LONGEST_WAIT, max(wait, self.first_wait * 2 ** (number - 1)))
            ):
                break
            wait, is_gone = 0.0, False
            try:
                response = self._client.request(method, f"{self.url}{path}", json=body)
                if response.status_code == 429 or response.status_code >= 500:
                    trouble = f"says {self._status(response)}"
                    wait = _retry_after(response)
                else:
                    self._check_status(path, response)
                    return read(response.text if is_text else response.json())
            except (ServerGoneError, NoAnswerError):
                raise
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                trouble, is_gone = f"cannot be reached ({self._shown(str(error))})", True
            except httpx2.TimeoutException:
                trouble = "does not answer in time (--timeout)"
            except httpx2.HTTPError as error:
                trouble = f"broke off its answer ({self._shown(str(error)) or type(error).__name__})"
            except (HalfAnswerError, ValueError) as error:
                trouble = f"gave half an answer ({self._shown(str(error))})"
            except (KeyError, TypeError, AttributeError) as error:
                trouble = f"gave an answer of another form ({type(error).__name__}: {error})"
        if is_gone:
            then = "goes on where it stopped" if self.goes_on else "begins anew"
            raise ServerGoneError(
                f"--server {self.url} {trouble}. Start it, or correct the URL; the same command then {then}."
            )
        raise ServerTroubleError(f"the server {trouble}; tried {tries} times")

    def _check_status(self, path: str, response: httpx2.Response) -> None:
        status = response.status_code
        if status in (401, 403):
            hint = "is not accepted" if self._key else "is not set"
            raise ServerGoneError(
                f"--server {self.url} asks for a key ({status}), and the environment variable {KEY_VARIABLE} "
                f"{hint}. Set it to the server's key."
            )
        if status in (404, 405):
            raise ServerGoneError(
                f"--server {self.url}{path}: {self._status(response)}. Name the root of an OpenAI-compatible "
                "server, such as http://host:8000, and a model that it serves."
            )
        if not response.is_success:
            raise NoAnswerError(f"the server refuses the request: {self._status(response)}")

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
        """Text of others on one line, without the key, should they send it back."""
        clean = text.replace(self._key, "***") if self._key else text
        return " ".join(clean.split())[:SHOWN]


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise ValueError(f"--server is {url!r}, which is no URL. Write it as http://host:8000.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "--server holds a user name, a password, a query or a fragment, which messages would show. "
            f"Write it as http://host:8000, and give a key by the environment variable {KEY_VARIABLE}."
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date
        return 0.0
