"""Which runs use what lies in `data.cache_dir`: each run notes it there, and holds a lock while it runs.

`.runs/` in the cache folder has a file for each `output_dir`. A process that uses the cache for that output
folder has a shared lock (flock) on the file, so that `eagle3-ds cache prune`, on this host or on another with
the same disk, can tell a running run from one that was killed. All reading and writing of the files is done
under a lock on `.runs/lock`, which is held for moments: who finds a folder in the cache while `prune` decides
finds it whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from eagle3_ds.config import Recipe

USES = ".runs"
MUTEX = "lock"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """What a run has noted.

    Attributes:
        output_dir: of the run.
        names: of the folders in the cache that it uses, without `.partial`.
        used: when it last prepared, in seconds since 1970.
        is_held: whether a process of the run is at work now.
        is_preparing: whether that process does not know its folders yet.
    """

    output_dir: Path
    names: Sequence[str]
    used: float
    is_held: bool = False
    is_preparing: bool = False


class Noting:
    """Writes what a run uses; without a file, where the cache cannot be written to, nothing."""

    def __init__(self, cache: Path, output_dir: Path, file: TextIO | None) -> None:
        self._cache, self._output_dir, self._file = cache, output_dir, file

    def preparing(self) -> None:
        """From now on the run may look for any folder; what it used before stays noted."""
        self._write(lambda before: {**before, "preparing": True})

    def names(self, paths: Sequence[Path]) -> None:
        """These folders are the run's."""
        names = [path.name for path in paths]
        self._write(lambda before: {**before, "names": names, "preparing": False})

    def _write(self, change: Any) -> None:
        if self._file is None:
            return
        with locked(self._cache):
            before = {"names": [], "preparing": False, **_content(self._file)}
            changed = {**change(before), "output_dir": str(self._output_dir), "used": time.time()}
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(changed) + "\n")
            self._file.flush()


@contextmanager
def in_use(recipe: Recipe) -> Iterator[Noting]:
    """Hold what the run of this recipe uses in its cache folder: `eagle3-ds cache prune` leaves it alone.

    Where the folder or its disk does not let a run note that, the run goes on with a warning.
    """
    cache, output_dir = Path(recipe.data.cache_dir), Path(recipe.output_dir).resolve()
    file = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / USES
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            folder.chmod(cache.stat().st_mode & 0o7777)  # who may write to the cache may note its use
        name = hashlib.sha256(str(output_dir).encode()).hexdigest()[:16]
        with locked(cache):
            file = open(folder / f"{name}.json", "a+")  # noqa: SIM115 (open for as long as the run)
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        if file is not None:
            file.close()
        file = None
        logger.warning(
            "data.cache_dir: it cannot be noted in %s that this run uses it (%s), so `eagle3-ds cache prune` "
            "would not know: do not prune while it runs",
            cache,
            error,
        )
    try:
        yield Noting(cache, output_dir, file)
    finally:
        if file is not None:
            file.close()


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Alone with the notes in `.runs/`, for as long as the block takes."""
    with open(cache / USES / MUTEX, "a") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        yield


def read_uses(cache: Path) -> list[Use]:
    """What runs have noted in the cache folder, by their output folders; and of runs that noted nothing (an
    earlier version, or a cache that they could not write to) what the folders beside the cache say.

    Raises:
        ValueError: a note is damaged.
    """
    noted = [_read(file) for file in sorted((cache / USES).glob("*.json"))]
    known = {use.output_dir for use in noted}
    beside = (
        use_of_run(file.parent, cache) for file in sorted(cache.resolve().parent.glob("*/prepared.json"))
    )
    return noted + [use for use in beside if use is not None and use.output_dir not in known]


def use_of_run(output_dir: Path, cache: Path) -> Use | None:
    """What the prepared.json of an output folder names in this cache; None where it names nothing."""
    file = output_dir / "prepared.json"
    try:
        prepared = json.loads(file.read_text())
        paths = [Path(prepared[key]) for key in ("data", "store") if prepared[key] is not None]
        written = file.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of no run of ours
    names = [path.name for path in paths if path.parent == cache.resolve()]
    return Use(output_dir.resolve(), names, written) if names else None


def _read(file: Path) -> Use:
    # To lock a file for oneself alone, NFS wants it open for writing.
    try:
        stream = open(file, "r+")  # noqa: SIM115 (closed below)
    except PermissionError:
        stream, held = open(file), True  # noqa: SIM115 (another user's: it may be running)
    else:
        held = _is_held(stream)
    with stream:
        content = _content(stream)
    if not content and not held:
        # A run that ended before it noted anything.
        return Use(file, (), os.stat(file).st_mtime)
    preparing = bool(content.get("preparing", True))
    names = tuple(map(str, content.get("names", ())))
    output_dir = Path(content.get("output_dir", file))
    return Use(output_dir, names, float(content.get("used", 0)), held, held and preparing)


def _is_held(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    with suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_UN)
    return False


def _content(stream: TextIO) -> dict[str, Any]:
    stream.seek(0)
    text = stream.read()
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{stream.name} is damaged ({error}): remove that file when no run of the cache is at work"
        ) from error
    return dict(content)
