"""A slice of the fuzzing of `python -m benchmarks.fuzz`, and proof that it notices what it is there for."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import try_many, try_one
from judge.fuzz.mutations import damage_bytes, damage_values
from judge.fuzz.subjects import Hostfiles, Subject, make_subjects

SLICE = range(60)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return make_subjects(tmp_path_factory.mktemp("fuzz"))


def test_what_is_not_damaged_is_read(subjects: list[Subject]) -> None:
    for subject in subjects:
        for sample in subject.samples:
            subject.path.write_bytes(sample)
            subject.read()


def test_what_is_damaged_is_refused_clearly_or_read_rightly(subjects: list[Subject]) -> None:
    for subject in subjects:
        tally = try_many(subject, SLICE)
        assert not tally.failures, tally.failures[0]
        assert tally.read and tally.refused, subject.name


def test_damage_is_a_function_of_the_seed() -> None:
    content = b"target:\n  path: x\n"
    assert len({damage_bytes(content, Random(3)) for _ in range(3)}) == 1
    assert len({damage_bytes(content, Random(seed)) for seed in range(50)}) > 40
    assert damage_values({"a": [1, {"b": 2}]}, Random(3)) == damage_values({"a": [1, {"b": 2}]}, Random(3))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (KeyError("x"), "KeyError"),
        (ValueError("no file is named"), "not clearly"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "not clearly"),
        (AssertionError("wrong rows"), "wrong rows"),
        (None, "no answer after"),
    ],
)
def test_every_kind_of_failure_is_noticed(
    answer: Exception | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_SECONDS", 0.1)

    class Broken(Hostfiles):
        def read(self) -> None:
            if answer is None:
                time.sleep(5)
            else:
                raise answer

    with pytest.raises(AssertionError, match=words):
        try_one(Broken(tmp_path), 0)
    assert len(try_many(Broken(tmp_path), range(3)).failures) == 3
