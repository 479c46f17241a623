"""A run as its output folder tells it. Nothing is written, and no other folder is read."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.config import RESOLVED, Recipe, read_recipe, title_of
from eagle3_ds.launch.logs import Logs, RankEnd
from eagle3_ds.launch.ranks import first_error
from eagle3_ds.launch.state import STOPPED, RunState, read_state, read_steps
from eagle3_ds.watch.curves import Points
from eagle3_ds.watch.metrics import Metrics, MetricsReader

FINAL_WEIGHTS = "draft-final.safetensors"
TAIL_BYTES = 2**16
MESSAGES = 8
# What a line of a log must not do to a terminal: sequences that move its cursor, and other controls.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BAR = re.compile(r"^[\w -]+: +\d+%\|")
_HEADER = re.compile(r"^--- rank \d+ on (\S+), ")


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        last: steps of the whole run; None where they are not known yet.
        tokens_per_s, seconds_left: by the last steps, evaluation and checkpoints not counted; None before the
            first step, and `seconds_left` too where nothing is left to do.
        over: of how many steps these are.
        skipped: steps that were not finite.
    """

    step: int
    last: int | None
    tokens: int
    tokens_per_s: float | None
    seconds_left: float | None
    over: int
    skipped: int


@dataclass(frozen=True)
class RankView:
    """How a rank is.

    Attributes:
        host: empty where it did not start.
        state: what is known of it, in words.
        is_troubled: whether it ended otherwise than by finishing.
        peak_bytes: its peak memory by the last step; None before the first one.
        spoke: when its log was written last, in seconds since 1970; None without a log.
        last_line: of its log.
    """

    rank: int
    host: str
    state: str
    is_troubled: bool
    peak_bytes: int | None
    spoke: float | None
    last_line: str


@dataclass(frozen=True)
class RunView:
    """All that is shown of a run.

    Attributes:
        state: in words; has_ended: whether it changes no more.
        curves: by name, those that have a point.
        messages: the last lines of rank 0, progress bars left out.
        time: when all this was read, in seconds since 1970.
    """

    folder: Path
    title: str
    state: str
    has_ended: bool
    progress: Progress
    curves: Mapping[str, Points]
    ranks: Sequence[RankView]
    messages: Sequence[str]
    time: float


class RunReader:
    """Reads the output folder of one run, as often as it is asked.

    Raises:
        ValueError: there is no such folder, or it holds no run.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"RUN: {folder} {what}. Name the output_dir of a run, e.g. output/quickstart.")
        if not (folder / RESOLVED).is_file():
            raise ValueError(
                f"RUN: {folder} holds no run, for it has no {RESOLVED}. Name the output_dir of a run, e.g. "
                "output/quickstart."
            )
        self._folder, self._logs = folder, Logs(folder / "logs")
        self._metrics = MetricsReader(folder / "metrics.jsonl")

    def read(self) -> RunView:
        """The run as it is now.

        Raises:
            ValueError: a file of the run is damaged, or of another version of this program.
        """
        recipe, _ = read_recipe(self._folder / RESOLVED)
        state, metrics = read_state(self._folder), self._metrics.read()
        numbers = self._rank_numbers(recipe)
        ends = self._logs.ends(max(numbers, default=-1) + 1)
        words, has_ended = self._state(state, ends, len(numbers))
        # While a resumed run prepares, the logs that lie there are those of the run before.
        is_before = state is not None and state.phase == "preparing"
        silent = "no word of its end" if has_ended else "not started" if is_before else "running"
        return RunView(
            self._folder,
            title_of(recipe),
            words,
            has_ended,
            self._progress(recipe, metrics),
            {name: tuple(points) for name, points in metrics.curves.items() if points},
            [self._rank(rank, ends.get(rank), metrics, silent) for rank in numbers],
            self._messages(),
            time.time(),
        )

    def _rank_numbers(self, recipe: Recipe) -> Sequence[int]:
        """The ranks of the mesh; without `draft_dp` those that have a log."""
        mesh = recipe.parallel
        if mesh.draft_dp is not None:
            return range(mesh.draft_dp * mesh.ring * mesh.ulysses)
        names = (path.stem.partition("_")[2] for path in self._logs.folder.glob("rank_*.log"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _state(self, state: RunState | None, ends: Mapping[int, RankEnd], ranks: int) -> tuple[str, bool]:
        """What the run does or how it ended, and whether it has ended."""
        first = first_error(ends)
        error = "" if first is None else _first_error_words(first)
        if state is None:
            return self._state_without_file(ends, error)
        if state.phase == "ended":
            return _end_words(state, error), True
        where = f"process {state.pid} on {state.host}"
        if state.is_process_gone:
            return f"stopped while {state.phase}, {where} is gone{error and f'; {error}'}", True
        trouble = f"; all ranks have ended, {error}" if error and len(ends) == ranks else ""
        return f"{state.phase} ({where}){trouble}", False

    def _state_without_file(self, ends: Mapping[int, RankEnd], error: str) -> tuple[str, bool]:
        """For a folder that `prepare` alone or an earlier version has written."""
        if error:
            return f"failed; {error}", True
        if (self._folder / FINAL_WEIGHTS).is_file():
            return "finished training", True
        if ends:
            return "stopped before its end, without an error", True
        if self._logs.folder.is_dir():
            return "running, or ended without a word", False
        return "prepared, not started", False

    def _progress(self, recipe: Recipe, metrics: Metrics) -> Progress:
        steps = read_steps(self._folder)
        last = steps.last if steps is not None else recipe.train.steps
        over = len(metrics.speeds)
        seconds = sum(seconds for _, seconds in metrics.speeds)
        speed = sum(tokens for tokens, _ in metrics.speeds) / seconds if over else None
        left = seconds / over * (last - metrics.step) if over and last and last > metrics.step else None
        return Progress(metrics.step, last, metrics.tokens, speed, left, over, metrics.skipped)

    def _rank(self, rank: int, end: RankEnd | None, metrics: Metrics, silent: str) -> RankView:
        """`silent`: the state of a rank that has a log, and whose end was not written."""
        log = self._logs.output(rank)
        lines, spoke = _tail(log)
        hosts = [match[1] for line in lines if (match := _HEADER.match(line))]
        peak = metrics.peaks[rank] if rank < len(metrics.peaks) else None
        if end is not None:
            reason = "" if end.how == "finished" else f", {_clean(end.reason)}"
            state, troubled = f"{end.how} after step {end.step}{reason}", end.how != "finished"
        else:
            state = "not started" if spoke is None else silent
            troubled = state == "no word of its end"
        host = end.host if end is not None else hosts[-1] if hosts else _first_host(log)
        last_line = lines[-1] if lines else ""
        return RankView(rank, host, state, troubled, peak, spoke, last_line)

    def _messages(self) -> Sequence[str]:
        lines, _ = _tail(self._logs.output(0))
        return [line for line in lines if not _BAR.match(line)][-MESSAGES:]


def _end_words(state: RunState, error: str) -> str:
    if state.status == 0:
        return "finished"
    if state.status == STOPPED:
        return f"stopped before its end by a request, exit status {STOPPED}; --resume goes on"
    status = "" if state.status is None else f", exit status {state.status}"
    why = error or _clean(state.message)
    return f"failed{status}{why and f'; {why}'}"


def _first_error_words(end: RankEnd) -> str:
    where = f"of rank {end.rank} on {end.host} while {end.phase}, after {end.step} steps"
    return f"first error, {where}: {_clean(end.reason)}"


def _tail(path: Path) -> tuple[list[str], float | None]:
    """The last lines of a log that are not empty, and when it was written last; ([], None) without it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
            written = path.stat().st_mtime
    except FileNotFoundError:
        return [], None
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    if size > TAIL_BYTES:
        del lines[0]
    return [cleaned for line in lines if (cleaned := _clean(line))], written


def _first_host(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            match = _HEADER.match(file.readline(512))
    except FileNotFoundError:
        return ""
    return match[1] if match else ""


def _clean(text: str) -> str:
    """The text without controls of a terminal, on one line."""
    return " ".join(_ESCAPES.sub("", text.replace("\n", " ")).split())
