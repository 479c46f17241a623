"""What the package says, on a terminal and in a log file."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from eagle3_ds import say

logger = logging.getLogger("eagle3_ds.somewhere")


def tell_all() -> None:
    logger.debug("detail")
    logger.info("100% [of] it")
    logger.warning("odd")
    logger.error("wrong")


@pytest.mark.parametrize(
    ("level", "rank", "out", "err"),
    [
        ("info", None, "100% [of] it\n", "odd\nwrong\n"),
        ("info", 0, "100% [of] it\n", "[rank 0] odd\n[rank 0] wrong\n"),
        ("info", 3, "", "[rank 3] odd\n[rank 3] wrong\n"),
        ("debug", 0, "detail\n100% [of] it\n", "[rank 0] odd\n[rank 0] wrong\n"),
        ("error", None, "", "wrong\n"),
    ],
)
def test_levels_and_ranks(
    level: str, rank: int | None, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with say.telling(level, rank):
        tell_all()
    assert capsys.readouterr() == (out, err)


def test_the_callers_logging_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger(say.PACKAGE)
    before = (package.level, package.propagate, list(package.handlers))
    with pytest.raises(KeyError), say.telling("debug"):
        raise KeyError
    assert (package.level, package.propagate, list(package.handlers)) == before
    tell_all()
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_moves_on_a_terminal_and_is_whole_lines_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in say.progress_bar(range(20000), desc="count", unit=" things"):
            pass
        text = stream.getvalue()
        assert ("\r" in text) == stream.isatty()
    lines = text.splitlines()
    assert len(lines) == 2 and lines[0].startswith("count:   0%") and lines[1].startswith("count: 100%")


def test_lines_of_progress_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(say, "LINE_SECONDS", 0.2)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    now = 0.0
    bar = say.progress_bar(total=100, desc="count")
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    for _ in range(100):
        now += 0.05
        bar.update()
    bar.close()
    # 5 s of work: the first line, one per 0.2 s at most, the last.
    assert 10 < len(stream.getvalue().splitlines()) <= 27


def test_a_level_above_info_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with say.telling("warning"):
        assert list(say.progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
