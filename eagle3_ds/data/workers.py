"""The same function over many batches in several processes, results in the order of the batches."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

AHEAD = 4
"""Results per process that may wait for the result of an earlier batch that takes longer."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_batches(
    function: Callable[[Batch], Result], batches: Iterable[Batch], workers: int
) -> Generator[Result, None, None]:
    """`function` of every batch, in order, whatever the number of processes. What it raises is raised here,
    in order.

    Every process has work from the second batch on. A batch is read when a process is free for it, unless
    results wait for an earlier one already. Closing the generator ends the processes.
    """
    batches = iter(batches)
    first = list(islice(batches, 2))
    left = enumerate(chain(first, batches))
    if workers == 1 or len(first) < 2:
        yield from (function(batch) for _, batch in left)
        return
    # Forked processes share the tokenizer and start at once; they touch nothing but Python and the tokenizer.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done: dict[int, tuple[Any, Exception | None]] = {}
    with ExitStack() as stack:
        pool: list[_Worker] = []
        for batch in islice(left, workers):
            pool.append(stack.enter_context(_Worker(context, function)))
            pool[-1].give(*batch)
        for number in itertools.count():
            while number not in done:
                busy = [worker for worker in pool if worker.number is not None]
                if not busy:
                    return
                ready = wait([worker.connection for worker in busy])
                for worker in busy:
                    if worker.connection in ready:
                        worker.take(done, workers)
                _give(pool, left, AHEAD * workers - len(done))
            result, error = done.pop(number)
            _give(pool, left, AHEAD * workers - len(done))
            if error is not None:
                raise error
            yield result


def _give(pool: Iterable[_Worker], batches: Iterator[tuple[int, Any]], most: int) -> None:
    """The next batches, at most so many, to the processes that wait for one."""
    idle = [worker for worker in pool if worker.number is None][: max(most, 0)]
    for worker, batch in zip(idle, islice(batches, len(idle)), strict=False):
        worker.give(*batch)


class _Worker:
    """A process that waits for batches. Use as a context manager: leaving it ends the process, whatever it
    does.
    """

    def __init__(self, context: Any, function: Callable[[Any], Any]) -> None:
        self.number: int | None = None
        """Of the batch that it works at."""
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()  # else the end of the process would not end the pipe

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def give(self, number: int, batch: Any) -> None:
        self.connection.send(batch)
        self.number = number

    def take(self, done: dict[int, tuple[Any, Exception | None]], workers: int) -> None:
        """Put the outcome of the batch given last under its number."""
        assert self.number is not None
        try:
            done[self.number] = self.connection.recv()
        except (EOFError, ConnectionError) as ended:
            raise ValueError(
                f"one of {workers} processes that read the data was killed, most likely for lack of memory: "
                "lower data.workers"
            ) from ended
        self.number = None


def _serve(function: Callable[[Any], Any], connection: Connection, parents_end: Connection) -> None:
    parents_end.close()  # this process's copy: else the end of the parent would not end the pipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores belong to the other processes
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            connection.send(_outcome(function, connection.recv()))


def _outcome(function: Callable[[Any], Any], batch: Any) -> tuple[Any, Exception | None]:
    try:
        return function(batch), None
    except Exception as error:
        return None, error
