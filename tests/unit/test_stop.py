"""Requests to stop: noted, not obeyed at once; a second SIGINT ends the process; the clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from eagle3_ds.guard.stop import REASONS, SIGNALS, TIMEOUT, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Pytest's own are there again after each test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_first_one_counts(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert REASONS[stop.reason] == ""
        os.kill(os.getpid(), number)
        assert REASONS[stop.reason] == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert REASONS[stop.reason] == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_that_comes_when_the_run_has_stopped_is_ignored(number: signal.Signals) -> None:
    """Also while the interpreter goes down, when it has taken its own handlers away."""
    code = (
        "import os, sys\nfrom eagle3_ds.guard.stop import StopRequest\n"
        "class Late:\n    def __del__(self, kill=os.kill, own=os.getpid()):\n"
        f"        kill(own, {int(number)})\n"
        f"with StopRequest():\n    pass\nos.kill(os.getpid(), {int(number)})\nsys.late = Late()\n"
        "print('whole')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "whole\n")


def test_a_run_that_fails_can_be_ended_as_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="a bad row"), StopRequest():
        raise ValueError("a bad row")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    stop, other = StopRequest(timeout_minutes=2.0), StopRequest()
    monkeypatch.setattr(time, "monotonic", lambda: now + 119)
    assert stop.reason == 0
    monkeypatch.setattr(time, "monotonic", lambda: now + 125)
    assert REASONS[stop.reason] == TIMEOUT and other.reason == 0


def test_a_second_sigint_ends_a_process_that_cannot_listen() -> None:
    """The process waits in C, as in a collective, where no Python handler would run."""
    code = (
        "import ctypes\nfrom eagle3_ds.guard.stop import StopRequest\nwith StopRequest():\n    "
        "print('ready', flush=True)\n    ctypes.PyDLL(None).sleep(1)\n    print('noted', flush=True)\n    "
        "while True: ctypes.PyDLL(None).sleep(30)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
