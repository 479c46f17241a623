"""`eagle3-ds watch`: what it reads of a running, finished, failed or empty run, and what it shows of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eagle3_ds.checkpoint import format as checkpoint_format
from eagle3_ds.cli.main import main
from eagle3_ds.launch.state import STOPPED
from eagle3_ds.watch import RunReader, curve_words, page, progress_words, sparkline
from eagle3_ds.watch import reading as reading_module
from eagle3_ds.watch.curves import thinned
from eagle3_ds.watch.words import duration
from tests.unit.watched_run import GIB, RANKS, WatchedRun, record, running


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["watch", *map(str, words)]) == 0
    return capsys.readouterr().out


class Page(HTMLParser):
    """A page's elements by name with their attributes, and whether each is closed."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str | None]]] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_running_run_is_read(tmp_path: Path) -> None:
    running(tmp_path / "run")
    view = RunReader(tmp_path / "run").read()
    assert view.title.startswith("run: eagle3 draft of ")
    assert view.title.endswith("mesh draft_dp 1 x ring 2 x ulysses 2")
    assert view.state == f"training (process {os.getpid()} on {socket.gethostname()})" and not view.has_ended
    assert progress_words(view.progress) == (
        "step 3 of 10 (30%), 3,000 tokens, 500 tokens/s over the last 3 steps, 14 s of steps left"
    )
    assert view.curves == {
        "loss": ((1, 9.0), (2, 8.0), (3, 7.0)),
        "held-out loss": ((2, 8.5),),
        "acceptance length": ((1, 1.1), (2, 1.2), (3, 1.3)),
        "held-out acceptance": ((2, 1.25),),
        "decoded acceptance": ((2, 1.5),),
        "accuracy": ((1, 0.1), (2, 0.2), (3, 0.3)),
        "held-out accuracy": ((2, 0.25),),
    }
    assert [(rank.rank, rank.host, rank.state, rank.peak_bytes) for rank in view.ranks] == [
        (0, "node-0", "running", 2 * GIB),
        (1, "node-1", "running", 3 * GIB),
        (2, "node-1", "running", 4 * GIB),
        (3, "node-1", "running", 5 * GIB),
    ]
    assert view.ranks[0].last_line == "training: 30%|### | 3/10 [00:06<00:14, loss=7.0]"
    assert list(view.messages) == ["--- rank 0 on node-0, 2026-01-02 03:04:05", "attention kernel cpu"]
    assert all(rank.spoke is not None and abs(view.time - rank.spoke) < 60 for rank in view.ranks)


def test_when_a_rank_last_spoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run")
    now = time.time()
    os.utime(run.logs.output(1), (now, now - 125))
    # The clock of the storage may be ahead.
    os.utime(run.logs.output(2), (now, now + 500))
    rows = {line.split()[0]: line for line in shown(capsys, run.folder, "--once").splitlines() if line}
    assert "2 min ago" in rows["1"] and " 0 s ago" in rows["2"]


def test_time_left_and_speed_are_those_of_the_last_steps(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "run", "train.steps=1030")
    run.metrics(*(record(step, tokens_per_s=1.0) for step in range(1, 11)))
    run.metrics(*(record(step, tokens_per_s=2000.0) for step in range(11, 31)))
    told = progress_words(RunReader(run.folder).read().progress)
    assert told.endswith("30,000 tokens, 2,000 tokens/s over the last 20 steps, 8 min 20 s of steps left")


def test_a_half_written_line_waits_for_its_rest(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    reader = RunReader(run.folder)
    run.metrics(rest='{"step": 4, "lo')
    assert reader.read().progress.step == 3
    run.metrics(rest='ss": 6.0, "tokens": 1000, "tokens_per_s": 500.0, "peak_memory_bytes": []}')
    assert reader.read().progress.step == 3
    run.metrics(rest="\n")
    view = reader.read()
    assert (view.progress.step, view.progress.tokens, view.curves["loss"][-1]) == (4, 4000, (4, 6.0))


def test_the_file_of_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    reader = RunReader(run.folder)
    assert reader.read().progress.tokens == 3000
    aside = tmp_path / "aside"
    (run.folder / "metrics.jsonl").rename(aside)
    run.metrics(record(1), record(2, loss=1.0), record(3), record(4))
    view = reader.read()
    assert view.progress.tokens == 4000 and view.curves["loss"][1] == (2, 1.0)
    (run.folder / "metrics.jsonl").unlink()
    assert reader.read().progress.tokens == 0


def test_a_damaged_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run")
    run.metrics(rest="no line\n")
    assert main(["watch", str(run.folder), "--once"]) == 2
    assert "metrics.jsonl, line 4 is no step's metrics: 'no line'. Remove it." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"phase": "training"}'])
def test_a_damaged_state_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run")
    (run.folder / "state.json").write_text(content)
    assert main(["watch", str(run.folder), "--once"]) == 2
    told = capsys.readouterr().err
    assert "state.json is damaged" in told and "Remove it." in told


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = WatchedRun(tmp_path / "run", "train.steps=2")
    run.metrics(record(1), record(2))
    for rank in range(RANKS):
        run.log(rank)
        run.end(rank, "finished", "exit code 0", 2)
    run.state("finishing")
    assert RunReader(run.folder).read().state.startswith("finishing (process ")
    run.state("ended", 0)
    view = RunReader(run.folder).read()
    assert (view.state, view.has_ended) == ("finished", True)
    assert [rank.state for rank in view.ranks] == ["finished after step 2"] * RANKS
    told = shown(capsys, run.folder)
    assert "\nfinished\nstep 2 of 2 (100%), 2,000 tokens, 500 tokens/s over the last 2 steps\n" in told
    assert "left" not in told


def test_a_failed_run_says_the_first_error_and_every_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running(tmp_path / "run")
    run.end(2, "raised", "ValueError: a bad row", 3, time=1.0)
    run.end(0, "ended", "end rank 2 on node-0 failed", 3, time=2.0)
    first = "first error, of rank 2 on node-0 while training, after 3 steps: ValueError: a bad row"
    view = RunReader(run.folder).read()
    assert view.state.startswith("training (") and not view.has_ended, "it may be started again"
    run.state("ended", 7, "ValueError: a bad row")
    view = RunReader(run.folder).read()
    assert (view.state, view.has_ended) == (f"failed, exit status 7; {first}", True)
    assert [rank.state for rank in view.ranks] == [
        "ended after step 3, end rank 2 on node-0 failed",
        "no word of its end",
        "raised after step 3, ValueError: a bad row",
        "no word of its end",
    ]
    assert all(rank.is_troubled for rank in view.ranks)
    assert first in shown(capsys, run.folder)


def test_all_ranks_have_ended_and_the_command_has_not_said_so(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    for rank in range(RANKS):
        run.end(rank, "killed", "the launcher that started this rank is gone", 3, time=rank)
    run.state("training", host="another")
    view = RunReader(run.folder).read()
    assert not view.has_ended
    assert (
        "training (process" in view.state and "; all ranks have ended, first error, of rank 0" in view.state
    )


def test_a_command_that_was_killed(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.state("training", pid=gone.pid)
    view = RunReader(run.folder).read()
    here = socket.gethostname()
    assert (view.state, view.has_ended) == (
        f"stopped while training, process {gone.pid} on {here} is gone",
        True,
    )
    run.state("training", pid=gone.pid, host=f"not-{here}")
    assert not RunReader(run.folder).read().has_ended, "another host's processes are not known here"


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (STOPPED, "", "stopped before its end by a request, exit status 75; --resume goes on"),
        (None, "ValueError: no such\n target", "failed; ValueError: no such target"),
        (9, "", "failed, exit status 9"),
    ],
)
def test_how_a_run_ended(status: int | None, message: str, expected: str, tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "run")
    run.state("ended", status, message)
    view = RunReader(run.folder).read()
    assert (view.state, view.has_ended) == (expected, True)


def test_a_resumed_run_prepares_beside_the_logs_of_the_run_before(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    run.state("preparing")
    assert [rank.state for rank in RunReader(run.folder).read().ranks] == ["not started"] * RANKS


def test_a_run_without_a_state_is_told_by_what_it_left(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "run")

    def state() -> tuple[str, bool]:
        view = RunReader(run.folder).read()
        return view.state, view.has_ended

    assert state() == ("prepared, not started", False)
    run.log(0)
    assert state() == ("running, or ended without a word", False)
    run.end(0, "finished", "exit code 0", 3)
    assert state() == ("stopped before its end, without an error", True)
    run.end(0, "raised", "ValueError: x", 3)
    assert state()[0].startswith("failed; first error, of rank 0") and state()[1]
    run.end(0, "finished", "exit code 0", 3)
    (run.folder / reading_module.FINAL_WEIGHTS).touch()
    assert state() == ("finished training", True)
    assert reading_module.FINAL_WEIGHTS == checkpoint_format.FINAL_WEIGHTS


def test_ranks_of_a_mesh_that_is_not_resolved_are_those_with_a_log(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "run", "parallel.draft_dp=null")
    assert list(RunReader(run.folder).read().ranks) == []
    for rank in (0, 10, 2):
        run.log(rank)
    assert [rank.rank for rank in RunReader(run.folder).read().ranks] == [0, 2, 10]


@pytest.mark.parametrize("file", ["", "metrics.jsonl"])
def test_an_empty_run_has_no_figure_that_is_none(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = WatchedRun(tmp_path / "run", "train.steps=null", "train.epochs=1")
    run.state("preparing")
    if file:
        (run.folder / file).touch()
    told = shown(capsys, run.folder, "--once", "--html", tmp_path / "page.html")
    html = Page((tmp_path / "page.html").read_text())
    assert "no step yet\n" in told and "no step yet\n" in html.text
    assert not re.search(r"\b(nan|None|inf)\b", told + html.text, re.IGNORECASE)
    assert "no curve yet\n" in told and "svg" not in html.found
    run.steps(0, 12)
    assert "no step yet of 12\n" in shown(capsys, run.folder, "--once")


def test_steps_that_were_not_finite_are_counted_and_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = WatchedRun(tmp_path / "run", "train.steps=9")
    bad = {"loss": float("nan"), "acceptance_length": float("inf"), "skipped": True}
    run.metrics(record(1), record(2, **bad), record(3, acceptance_length_decoded=None))
    view = RunReader(run.folder).read()
    assert view.curves["loss"] == ((1, 9.0), (3, 7.0)) and "decoded acceptance" not in view.curves
    told = shown(capsys, run.folder, "--once", "--html", tmp_path / "page.html")
    assert "1 of the steps were not finite and skipped" in told
    assert not re.search(r"\b(nan|inf)\b", told + (tmp_path / "page.html").read_text(), re.IGNORECASE)


def test_what_a_log_holds_reaches_neither_terminal_nor_page_as_commands(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    run.log(0, "\x1b[2J\x1b[31mred\x1b[0m\x07 <script>alert(1)</script> & [bold]")
    view = RunReader(run.folder).read()
    assert view.messages[-1] == "red <script>alert(1)</script> & [bold]"
    text = page(view)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert view.messages[-1] in Page(text).text


def test_messages_are_the_last_and_a_long_log_is_not_read_whole(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    run.log(0, *(f"message {number} {'x' * 100}" for number in range(2000)))
    view = RunReader(run.folder).read()
    assert [line.split()[1] for line in view.messages] == [str(number) for number in range(1992, 2000)]
    assert view.ranks[0].host == "node-0"


def test_the_page_is_whole_holds_the_curves_and_needs_no_other_file(tmp_path: Path) -> None:
    running(tmp_path / "run")
    view = RunReader(tmp_path / "run").read()
    html = Page(page(view))
    drawn = [figure["aria-label"] for figure in html.found["svg"]]
    assert drawn == list(view.curves) and len(drawn) == 7
    lines = [str(line["points"]) for line in html.found["polyline"]]
    assert lines[0] == "4.0,4.0 240.0,60.0 476.0,116.0", "a loss that falls falls"
    assert lines[1] == "4.0,116.0 240.0,60.0 476.0,4.0", "acceptance that rises rises"
    assert len(html.found["circle"]) == 4, "curves of one point"
    attributes = {name for found in html.found.values() for values in found for name in values}
    assert not attributes & {"src", "href"} and not {"script", "link", "img"} & set(html.found)
    for words in (view.title, view.state, progress_words(view.progress), "attention kernel cpu", "node-1"):
        assert words in html.text
    assert len(html.found["tr"]) == 1 + RANKS
    assert len(html.found["meta"]) == 1
    assert Page(page(view, 3)).found["meta"][1] == {"http-equiv": "refresh", "content": "3"}


def test_the_terminal_holds_what_the_page_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run")
    told = shown(capsys, run.folder, "--once", "--html", tmp_path / "page.html")
    view = RunReader(run.folder).read()
    html = Page((tmp_path / "page.html").read_text())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for words in (view.title, view.state, progress_words(view.progress), *view.curves, *view.messages):
        assert words in told and words in html.text
    for rank in view.ranks:
        assert rank.last_line in told and rank.last_line in html.text
    assert re.search(r"^loss +█▅▁ +7 +9 +7 +9 *$", told, re.MULTILINE)
    assert re.search(r"^3 +node-1 +running +5\.00 +\d+ s ago +--- rank 3 on node-1", told, re.MULTILINE)


def test_the_live_view_ends_with_the_run_and_keeps_the_page_new(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    html = tmp_path / "page.html"
    # A terminal of its own, which only `script` or the like gives.
    program = f"""
import sys, time
from rich import console
from eagle3_ds.cli import watch
from eagle3_ds.cli.main import main
watch.EVERY_SECONDS = 0.2
sys.stdout.isatty = lambda: True
sys.exit(main(["watch", {str(run.folder)!r}, "--html", {str(html)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "100", "FORCE_COLOR": "1", "TERM": "xterm"},
    )
    try:
        deadline = time.monotonic() + 60
        while not html.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "step 3 of 10" in html.read_text() and process.poll() is None
        assert 'http-equiv="refresh"' in html.read_text()
        run.metrics(record(4))
        while "step 4 of 10" not in html.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.state("ended", STOPPED)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    last = told.rpartition("\x1b[?1049l")[2]
    assert "stopped before its end by a request" in last and "step 4 of 10" in last
    assert "step 3 of 10" in told and "stopped before" in html.read_text()
    assert "http-equiv" not in html.read_text()


def test_a_live_view_shows_ranks_in_trouble_first(tmp_path: Path) -> None:
    from rich.console import Console

    from eagle3_ds.cli.watch import SHOWN_RANKS, _drawn

    run = WatchedRun(tmp_path / "run", "parallel.draft_dp=8")
    run.state("training")
    for rank in range(32):
        run.log(rank)
    run.end(29, "killed", "killed by SIGKILL", 3)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(_drawn(RunReader(run.folder).read(), SHOWN_RANKS, 100))
    text = console.export_text()
    rows = re.findall(r"^(\d+) +node-0 ", text, re.MULTILINE)
    assert rows == ["29", *map(str, range(15))]
    assert "16 more ranks; --once and --html show all" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["nowhere"], "RUN: nowhere does not exist. Name the output_dir of a run"),
        ([tmp_path / "file"], f"RUN: {tmp_path / 'file'} is a file. Name the output_dir of a run"),
        ([tmp_path / "empty"], "empty holds no run, for it has no recipe.resolved.yaml. Name the output_dir"),
        ([run.folder, "--html", tmp_path / "no" / "p.html"], f"--html: {tmp_path / 'no'} is no folder."),
        ([run.folder, "--html", tmp_path / "empty"], f"--html: {tmp_path / 'empty'} is a folder."),
        ([], "Missing argument 'RUN'"),
    ):
        assert main(["watch", *map(str, words)]) == 2
        told = capsys.readouterr()
        assert message in told.err and told.out == "" and "Traceback" not in told.err


def test_the_shell_passes_the_command_on() -> None:
    shell = (Path(__file__).parents[2] / "launch.sh").read_text()
    usage, _, cases = shell.partition("TEXT\n}")
    assert "./launch.sh watch RUN [--once] [--html FILE]" in usage
    assert re.search(r"^  .*\| watch \|.*\) exec ", cases, re.MULTILINE)


def test_sparklines() -> None:
    points = tuple((step, float(step)) for step in range(1, 9))
    assert sparkline(points, 48) == "▁▂▃▄▅▆▇█"
    assert sparkline(points, 2) == "▁█" and sparkline((), 48) == "" and sparkline(((1, 2.0),), 48) == "▅"
    assert sparkline(((1, 2.0), (2, 2.0)), 48) == "▅▅"
    assert thinned(points, 3) == [(1.5, 1.5), (4.0, 4.0), (7.0, 7.0)]
    assert thinned(points, 8) == [(step, value) for step, value in points]
    assert curve_words(((1, 9.0), (2, 0.123456), (3, 4.0))) == ("9", "4", "0.1235", "9")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (93784, "1 d 2 h")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
