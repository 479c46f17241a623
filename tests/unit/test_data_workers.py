"""Processes that share a list of batches: results in order, errors in order, no process left behind."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from eagle3_ds.data.workers import AHEAD, map_batches, usable_cores


@pytest.fixture
def children_left():
    """Lists the processes started by a test and still alive; pools that other tests share do not count."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


def square(number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_results_come_in_order(workers, count, children_left):
    results = list(map_batches(square, iter(range(count)), workers))
    assert [result for result, _ in results] == [number * number for number in range(count)]
    elsewhere = {process for _, process in results} - {os.getpid()}
    assert len(elsewhere) <= (min(workers, count) if workers > 1 and count > 1 else 0)
    assert bool(elsewhere) == (workers > 1 and count > 1)
    assert not children_left()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_in_order_is_raised(workers, children_left):
    batches = [*range(5), -3, 5, -1]
    results = map_batches(square, batches, workers)
    assert [next(results)[0] for _ in range(5)] == [number * number for number in range(5)]
    with pytest.raises(ValueError, match="^-3 is negative$"):
        next(results)
    assert not children_left()


def test_batches_are_read_only_as_results_are_taken(children_left):
    taken = []

    def numbers():
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_batches(square, numbers(), 2)
    next(results)
    assert len(taken) <= 2 * (1 + AHEAD)
    results.close()
    assert not children_left()


def sleep(seconds):
    time.sleep(seconds)
    return seconds, os.getpid()


def test_a_long_batch_holds_nobody_up():
    started = time.monotonic()
    results = list(map_batches(sleep, [1.0, *[0.1] * 8], 2))
    assert [seconds for seconds, _ in results] == [1.0, *[0.1] * 8]
    # By turns, the others would have waited for the first: 1.4 s at least.
    assert len({process for _, process in results[1:8]}) == 1
    assert time.monotonic() - started < 30


def die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_reported(children_left):
    with pytest.raises(
        ValueError, match="one of 2 processes that read the data was killed, .*: lower data.workers"
    ):
        list(map_batches(die, range(2 * 5), 2))
    assert not children_left()


def work_for_ever(numbers):
    results = map_batches(square, itertools.count(), 3)
    next(results)
    numbers.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_process_outlives_a_killed_parent(capfd):
    context = multiprocessing.get_context("fork")
    numbers, theirs = context.Pipe()
    parent = context.Process(target=work_for_ever, args=(theirs,))
    parent.start()
    workers = numbers.recv()
    assert len(workers) == 3 and all(map(is_alive, workers))
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while (alive := [number for number in workers if is_alive(number)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in alive:
        os.kill(number, signal.SIGKILL)
    assert not alive
    assert "Traceback" not in capfd.readouterr().err


def is_alive(process):
    """A zombie, which nobody has waited for yet, is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_usable_cores():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
