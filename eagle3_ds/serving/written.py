"""The file that a server's answer names: where it is, when it is complete, and its removal.

Two connectors write such files: ours (`connector`), aside and renamed, and vLLM's own
`ExampleHiddenStatesConnector`, under a lock. `rows` reads either.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

from eagle3_ds.patient_http import HalfAnswerError

ROWS_FILE = "eagle3_ds_rows"
STOCK_FILE = "hidden_states_path"
"""The key in an answer's kv_transfer_params by which each connector names the file."""
SETTLE_SECONDS = 5.0
"""How long a network file system may take to show a second file after the first."""


class WrittenFile(Protocol):
    """What is asked of a file that a server writes.

    Attributes:
        is_stock: vLLM's own connector writes it.
    """

    path: Path
    is_stock: bool

    def is_complete(self) -> bool:
        """Whether it can be read now.

        Raises:
            HalfAnswerError: it was not written; asking again may help.
            ValueError: it was not, and will not be.
        """
        ...

    def too_late(self, seconds: float) -> str:
        """Why it is not complete after so long."""
        ...

    def remove(self) -> None:
        """Remove it, and what belongs to it."""
        ...


def written_file(answer: Any, folder: Path, url: str) -> WrittenFile:
    """The file that an answer names, by whichever connector.

    Raises:
        ValueError: it names none, or one outside of `folder`.
    """
    told: Mapping[str, Any] = answer.get("kv_transfer_params") or {}
    name, stock = told.get(ROWS_FILE), told.get(STOCK_FILE)
    if isinstance(name, str) and re.fullmatch(r"[\w-]+", name):
        return OurFile(folder, name)
    if isinstance(stock, str) and name is None:
        return StockFile(folder, stock)
    raise ValueError(
        f"the server at {url} answers and writes no hidden states: it runs without this program's connector. "
        "Start it as docs/hidden-states.md shows, or set target.server.url to null."
    )


class OurFile:
    """A file of our connector: it appears whole, or its `.failed` says why not."""

    is_stock = False

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self._failed = folder / f"{name}.safetensors", folder / f"{name}.failed"

    def is_complete(self) -> bool:
        if self.path.is_file():
            return True
        if not self._failed.is_file():
            return False
        reason = self._failed.read_text() or "no reason given"
        self._failed.unlink(missing_ok=True)
        if "No space left" in reason:
            raise ValueError(
                f"the server could not write hidden states ({reason}): free some space in "
                f"target.server.folder ({self.path.parent}), or lower target.server.concurrency. Then "
                "run the same command again: it goes on after the documents that are done."
            )
        raise HalfAnswerError(f"it could not write hidden states: {reason}")

    def too_late(self, seconds: float) -> str:
        return _did_not_appear(self.path, seconds)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class StockFile:
    """A file of vLLM's own connector. `PATH.lock` exists before the answer is sent; the server holds it
    exclusively until the file is written, or until writing has failed, of which its log alone knows. The
    client removes both.

    Raises:
        ValueError: the path is not one of a file in `folder`.
    """

    is_stock = True

    def __init__(self, folder: Path, told: str) -> None:
        named = PurePath(told)
        is_plain = named.is_absolute() and ".." not in named.parts and told.isprintable()
        if not (
            is_plain
            and named.suffix == ".safetensors"
            and Path(told).resolve().is_relative_to(folder.resolve())
        ):
            raise ValueError(
                f"the server writes hidden states to {told!r}, which is no file in target.server.folder "
                f"({str(folder)!r}), and is neither read nor removed. Name there the shared_storage_path of "
                "the server's connector: an absolute path, the same for the server and here."
            )
        self.path, self._lock = Path(told), Path(f"{told}.lock")
        self._odd_since: float | None = None

    def is_complete(self) -> bool:
        is_free = self._is_free()
        if is_free and self.path.is_file():
            return True
        if is_free is None and self.path.is_file() and self._stays_odd():
            raise ValueError(
                f"{self.path} has no lock beside it, and nothing else says when it is complete: the server's "
                "ExampleHiddenStatesConnector runs with use_synchronization_lock false, or is of a vLLM "
                "without that lock. Remove the setting, or give the server this program's connector "
                "(docs/hidden-states.md)."
            )
        if is_free and self._stays_odd():
            raise HalfAnswerError(
                f"{self.path} was not written, and its lock is free: the server's log says why (no space "
                "left in target.server.folder, or the server was restarted)"
            )
        return False

    def too_late(self, seconds: float) -> str:
        if self._is_free() is False:
            return f"{self.path} is not complete after {seconds:g} s: the server still holds its lock"
        return _did_not_appear(self.path, seconds)

    def remove(self) -> None:
        self._lock.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _is_free(self) -> bool | None:
        """Whether the server has let go of the lock; None while there is none."""
        try:
            with open(self._lock, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return False
        except OSError as error:
            raise ValueError(
                f"{self._lock} cannot be locked ({error}): target.server.folder must be on a file system "
                "with flock, and readable for this user. Choose another folder, or give the server this "
                "program's connector, which needs no locks (docs/hidden-states.md)."
            ) from error

    def _stays_odd(self) -> bool:
        """Whether one file is there without the other for longer than a network file system explains."""
        if self._odd_since is None:
            self._odd_since = time.monotonic()
        return time.monotonic() > self._odd_since + SETTLE_SECONDS


def _did_not_appear(path: Path, seconds: float) -> str:
    return (
        f"{path} did not appear in {seconds:g} s: the server's connector must write to "
        "target.server.folder, on a file system that both hosts share"
    )
