"""Requests to stop: noted, not obeyed at once; a second SIGINT ends the process; the clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from eagle3_ds.guard.stop import REASONS, SIGNALS, TIMEOUT, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_first_one_counts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert REASONS[stop.reason] == ""
        os.kill(os.getpid(), number)
        assert REASONS[stop.reason] == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert REASONS[stop.reason] == number.name
    assert signal.getsignal(number) == before


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
