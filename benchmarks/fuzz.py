"""Damaged recipes, hostfiles, data rows, store indexes and checkpoint manifests: each is refused clearly, or
read rightly.

    python -m benchmarks.fuzz --each 1000

An input is refused clearly when a `ValueError` of ours names the file. It is read rightly when what was read
passes the subject's own test: a recipe that is written and read again is the same, a store gives the rows
that were stored. Anything else is a failure: another exception, a `ValueError` that Python raised by itself,
an input that takes longer than LIMIT_SECONDS. Exit status 1 on failures; each is printed with the seed that
makes it again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from judge.fuzz.subjects import Subject, make_subjects
from judge.result_file import print_table, write_result

LIMIT_SECONDS = 10.0


@dataclass
class Tally:
    """What became of a subject's inputs."""

    refused: int = 0
    read: int = 0
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


class TooSlow(BaseException):
    """Not an `Exception`: nothing on the way may take it for an answer."""


def try_one(subject: Subject, seed: int) -> str | None:
    """The first words of the refusal, or None when the input was read rightly.

    Raises:
        AssertionError: neither refused clearly nor read rightly.
    """
    chance = Random(f"{subject.name}/{seed}")
    subject.path.write_bytes(subject.damaged(chance))
    try:
        with _limited():
            subject.read()
    except ValueError as error:
        if type(error) is not ValueError or subject.named not in str(error):
            raise AssertionError(f"refused, but not clearly: {error!r}") from error
        return str(error).replace(subject.named, "").strip(" :,")[:40]
    except TooSlow as error:
        raise AssertionError(f"no answer after {LIMIT_SECONDS} s") from error
    except Exception as error:
        raise AssertionError("".join(traceback.format_exception(error)[-3:])) from error
    return None


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_many(subject: Subject, seeds: Sequence[int]) -> Tally:
    tally = Tally()
    for seed in seeds:
        try:
            refusal = try_one(subject, seed)
        except AssertionError as failure:
            tally.failures.append(f"{subject.name}, seed {seed}: {failure}")
            continue
        if refusal is None:
            tally.read += 1
        else:
            tally.refused += 1
            tally.reasons[refusal] += 1
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed, to make one input again")
    parser.add_argument("--only", help="one kind")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        subjects = [
            subject for subject in make_subjects(Path(folder)) if options.only in (None, subject.name)
        ]
        seeds = range(options.first, options.first + options.each)
        tallies = {subject.name: try_many(subject, seeds) for subject in subjects}
    for tally in tallies.values():
        for failure in tally.failures:
            print(failure)
    rows = [
        (name, options.each, tally.refused, len(tally.reasons), tally.read, len(tally.failures))
        for name, tally in tallies.items()
    ]
    columns = ("damaged", "inputs", "refused clearly", "kinds of refusal", "read rightly", "failures")
    print_table("Damaged inputs", columns, rows)
    if options.only is None and options.first == 0:
        body = {"inputs": [dict(zip(columns, row, strict=True)) for row in rows]}
        write_result("fuzz", f"python -m benchmarks.fuzz --each {options.each}", body)
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
