"""What lies in `data.cache_dir`, whose it is, and what of it may go.

An entry is a folder of documents (`data-…`) or a store of hidden states (`hidden-…`), or one of them that is
being written (`.data-…-…`, `hidden-….partial`). Whatever else lies there is named and left alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from eagle3_ds.config import Recipe
from eagle3_ds.data.documents import DOCUMENTS_FILE, PICTURE_FILE, STATISTICS_FILE, TABLES_FILE
from eagle3_ds.data.prepare import ABANDONED_AFTER
from eagle3_ds.run.cache_uses import MUTEX, USES, Use, locked, read_uses, use_of_run
from eagle3_ds.run.stages import places_in_cache
from eagle3_ds.store import HiddenStateStore
from eagle3_ds.store.index import INDEX_FILE

DAY = 86400.0
DOCUMENTS, STATES = "documents", "hidden states"
NAMES = {
    DOCUMENTS: re.compile(r"(?:data-[0-9a-f]{16}|\.data-[0-9a-f]{16}-\w+)"),
    STATES: re.compile(r"hidden-[0-9a-f]{16}(?:\.partial)?"),
}
FILES = {
    DOCUMENTS: re.compile(
        "|".join(map(re.escape, (DOCUMENTS_FILE, TABLES_FILE, STATISTICS_FILE, PICTURE_FILE)))
    ),
    STATES: re.compile(rf"\.?{re.escape(INDEX_FILE)}|\.?shard-[0-9]{{4,9}}-[0-9]{{6,9}}\.safetensors"),
}
REMOVED = ".removed-"
"""Before the name of what `prune` has taken away and is deleting; a `prune` that was killed leaves it so."""


@dataclass(frozen=True)
class Entry:
    """A folder in the cache.

    Attributes:
        name: what runs call it: without `.partial` and what is around the name while it is written.
        kind: `documents` or `hidden states`; None where it is not recognised.
        strange: why it is not recognised; empty where it is.
        bytes: of its files.
        tokens: that it holds; None where that is not known, as of something unfinished.
        made, last_used: seconds since 1970.
        problem: why it is not whole; empty where it is.
        recipes: those given that use it.
        uses: the runs that have noted it.
    """

    path: Path
    name: str
    kind: str | None
    strange: str = ""
    bytes: int = 0
    tokens: int | None = None
    made: float = 0.0
    last_used: float = 0.0
    problem: str = ""
    recipes: Sequence[str] = ()
    uses: Sequence[Use] = field(default_factory=tuple)

    @property
    def holder(self) -> Path | None:
        """The output folder of a run that is at work with it now."""
        return next((use.output_dir for use in self.uses if use.is_held), None)


@dataclass(frozen=True)
class Given:
    """A recipe by the name that the user gave it, and what of a cache it uses."""

    title: str
    cache: Path
    names: Sequence[str]


@dataclass(frozen=True)
class Pruning:
    """What goes, and what of the rest a user might have expected to go: {entry: why it stays}."""

    removed: Sequence[Entry]
    kept: Sequence[tuple[Entry, str]]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.removed)


def given_recipe(title: str, recipe: Recipe) -> Given:
    """What a recipe as it stands would find in its cache, and what its last run has used.

    Raises:
        ValueError: that cannot be told, because the target or a source of the data is missing.
    """
    cache = Path(recipe.data.cache_dir)
    try:
        names = [path.name for path in places_in_cache(recipe)]
    except ValueError as error:
        raise ValueError(f"what {title} uses in {cache} cannot be told: {error}") from error
    last = use_of_run(Path(recipe.output_dir), cache) if cache.is_dir() else None
    return Given(title, cache, [*names, *(last.names if last else ())])


def entries(cache: Path, recipes: Sequence[Given] = ()) -> list[Entry]:
    """What lies in the cache folder, the largest first.

    Raises:
        ValueError: there is no such folder, or the note of a run is damaged.
    """
    if not cache.is_dir():
        raise ValueError(f"data.cache_dir: {cache} is no folder. Nothing was cached there, or name another.")
    mutex = cache / USES / MUTEX
    with locked(cache) if os.access(mutex, os.W_OK) else nullcontext():
        return _entries(cache, recipes, read_uses(cache))


def prune(
    cache: Path, recipes: Sequence[Given], older_than: float | None = None, remove: bool = False
) -> Pruning:
    """Remove what none of the recipes uses; with `older_than`, of that only what was last used so many days
    ago. Without recipes, all that is so old.

    What a running run holds, what was written to within a day and is not finished, and what is not recognised
    stay.

    Args:
        remove: else only say what would go.

    Raises:
        ValueError: there is neither a recipe nor an age, no such folder, or a run is preparing, of which
            nobody knows yet what it will use.
    """
    if not recipes and older_than is None:
        raise ValueError(
            "nothing says what may go: name the recipes whose part of the cache stays, or give --older-than "
            "DAYS, e.g. --older-than 30."
        )
    if not cache.is_dir():
        raise ValueError(f"data.cache_dir: {cache} is no folder. Nothing was cached there, or name another.")
    (cache / USES).mkdir(exist_ok=True)
    with locked(cache):
        uses = read_uses(cache)
        preparing = [use for use in uses if use.is_preparing]
        if preparing:
            raise ValueError(
                f"the run of {preparing[0].output_dir} is preparing, and it is not known yet what it will "
                f"use of {cache}: prune once it trains."
            )
        found = _entries(cache, recipes, uses)
        reasons = [(entry, _why_kept(entry, older_than)) for entry in found]
        removed = [entry for entry, reason in reasons if not reason]
        aside = [_take_away(entry) for entry in removed] if remove else []
    for folder in aside:
        shutil.rmtree(folder)
    return Pruning(removed, [(entry, reason) for entry, reason in reasons if reason])


def _take_away(entry: Entry) -> Path:
    """Rename it, in a moment: a run that starts now finds nothing, and not a half of it."""
    if entry.path.name.startswith(REMOVED):
        return entry.path
    aside = entry.path.with_name(f"{REMOVED}{entry.path.name.lstrip('.')}-{os.getpid()}")
    os.rename(entry.path, aside)
    return aside


def _why_kept(entry: Entry, older_than: float | None) -> str:
    """Why an entry stays; empty where it may go."""
    if entry.kind is None:
        return f"not recognised: {entry.strange}"
    if entry.path.name.startswith(REMOVED):
        return ""
    if entry.holder is not None:
        return f"the run of {entry.holder} is at work with it"
    now = time.time()
    if entry.path.name != entry.name and now - entry.last_used < ABANDONED_AFTER:
        return "it was written to within a day, and may still be"
    if entry.recipes:
        return f"{', '.join(entry.recipes)} uses it"
    if older_than is not None and now - entry.last_used < older_than * DAY:
        return f"last used {(now - entry.last_used) / DAY:.1f} days ago"
    return ""


def _entries(cache: Path, recipes: Sequence[Given], uses: Sequence[Use]) -> list[Entry]:
    found = []
    for path in sorted(cache.iterdir()):
        if path.name == USES:
            continue
        entry = _look(path)
        own = tuple(use for use in uses if entry.name in use.names)
        active = [entry.last_used, *(use.used for use in own), *(_last_step(use.output_dir) for use in own)]
        of = tuple(given.title for given in recipes if entry.name in given.names)
        found.append(replace(entry, uses=own, recipes=of, last_used=max(active)))
    return sorted(found, key=lambda entry: -entry.bytes)


def _last_step(output_dir: Path) -> float:
    file = output_dir / "metrics.jsonl"
    return file.stat().st_mtime if file.is_file() else 0.0


def _look(path: Path) -> Entry:
    """An entry without its users."""
    bare = re.sub(rf"^{re.escape(REMOVED)}(.*)-[0-9]+$", r"\1", path.name)
    kind = next(
        (kind for kind, name in NAMES.items() if name.fullmatch(bare) or name.fullmatch(f".{bare}")), None
    )
    if kind is None or path.is_symlink() or not path.is_dir():
        size = 0 if path.is_dir() or path.is_symlink() else path.stat().st_size
        return Entry(path, path.name, None, "no name that this program gives to a folder", size)
    files = {file.name: file for file in path.iterdir()}
    strange = sorted(
        name for name, file in files.items() if not FILES[kind].fullmatch(name) or file.is_symlink()
    )
    sizes = [(file.stat().st_size, file.stat().st_mtime) for file in files.values()]
    times = [time for _, time in sizes] or [path.stat().st_mtime]
    name = next(iter(re.findall(r"(?:data|hidden)-[0-9a-f]{16}", bare)))
    entry = Entry(
        path, name, kind, bytes=sum(size for size, _ in sizes), made=min(times), last_used=max(times)
    )
    if strange:
        return replace(entry, kind=None, strange=f"it holds {strange[0]}, which this program did not write")
    if path.name != name:
        return replace(entry, problem="not finished" if bare == path.name else "being removed")
    tokens, problem = _content(path, kind, files)
    return replace(entry, tokens=tokens, problem=problem)


def _content(path: Path, kind: str, files: Mapping[str, Path]) -> tuple[int | None, str]:
    """Tokens, and what is wrong with the folder."""
    try:
        if kind == STATES:
            return sum(HiddenStateStore.open(path).lengths.values()), ""
        missing = [name for name in (DOCUMENTS_FILE, TABLES_FILE, STATISTICS_FILE) if name not in files]
        if missing:
            return None, f"{missing[0]} is missing"
        statistics = json.loads(files[STATISTICS_FILE].read_text())
        return int(statistics["train_tokens"]) + int(statistics["heldout_tokens"]), ""
    except (ValueError, KeyError, TypeError) as error:
        return None, f"damaged: {error}"
