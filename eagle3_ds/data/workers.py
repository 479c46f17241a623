"""The same function over many batches in several processes, results in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

POOL_FROM = 16
"""Batches; fewer are done before processes have started."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_batches(
    function: Callable[[Batch], Result], batches: Iterable[Batch], workers: int
) -> Generator[Result, None, None]:
    """`function` of every batch, in order, whatever the number of processes. What it raises is raised here,
    in order.

    Each process holds one batch at a time: the next is read only when its result has been taken. Closing the
    generator ends the processes.
    """
    batches = iter(batches)
    first = list(islice(batches, POOL_FROM))
    batches = chain(first, batches)
    if workers == 1 or len(first) < POOL_FROM:
        yield from map(function, batches)
        return
    # Forked processes share the tokenizer and start at once; they touch nothing but Python and the tokenizer.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ExitStack() as stack:
        pool = [stack.enter_context(_Worker(context, function)) for _ in range(workers)]
        for worker in pool:
            worker.give(batches)
        # Round robin keeps the order: a process's turn comes when those of all earlier batches have had
        # theirs.
        for worker in cycle(pool):
            if not worker.busy:
                return
            result = worker.take(workers)
            worker.give(batches)
            yield result


class _Worker:
    """A process that waits for batches. Use as a context manager: leaving it ends the process, whatever it
    does.
    """

    def __init__(self, context: Any, function: Callable[[Any], Any]) -> None:
        self.busy = False
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

    def give(self, batches: Iterator[Any]) -> None:
        """The next batch, if there is one."""
        for batch in islice(batches, 1):
            self.connection.send(batch)
            self.busy = True

    def take(self, workers: int) -> Any:
        """The result of the batch given last."""
        self.busy = False
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionError) as ended:
            raise ValueError(
                f"one of {workers} processes that read the data was killed, most likely for lack of memory: "
                "lower data.workers"
            ) from ended
        if error is not None:
            raise error
        return result


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
