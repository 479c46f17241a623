"""Exercises as a corpus: right answers, the same at every call, and no text that goes in circles."""

import ast
import json
import re
from itertools import islice

import pytest

from eagle3_ds.data import exercises
from eagle3_ds.data.chat import validate_messages
from eagle3_ds.data.corpora import CORPORA
from eagle3_ds.data.exercises import NUM_CONVERSATIONS, exercise_conversations, in_words
from eagle3_ds.data.loops import loops

TURNS = [
    (question["content"], answer["content"])
    for row in islice(exercise_conversations(), 2000)
    for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True)
]


def of_kind(beginning: str) -> list[tuple[str, str]]:
    """Turns whose question begins so, at least a hundred of them."""
    found = [turn for turn in TURNS if turn[0].startswith(beginning)]
    assert len(found) >= 100, beginning
    return found


def test_rows_are_conversations_and_always_the_same() -> None:
    rows = list(exercise_conversations())
    assert len(rows) == NUM_CONVERSATIONS and rows[:50] == list(islice(exercise_conversations(), 50))
    assert {len(row["messages"]) // 2 for row in rows} == {1, 2, 3}
    for number, row in enumerate(rows[:200]):
        validate_messages(row["messages"], f"row {number}")


def test_answers_vary_and_do_not_go_in_circles() -> None:
    answers = [answer for _, answer in TURNS]
    assert len(set(answers)) > 0.85 * len(answers)
    assert not [answer for answer in answers if loops([hash(word) for word in re.findall(r"\w+", answer)])]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (342, "three hundred and forty-two"),
        (1000, "one thousand"),
        (70_305, "seventy thousand three hundred and five"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_sums_and_tables_are_right() -> None:
    for question, answer in of_kind("Add"):
        one, other = map(int, re.findall(r"\d+", question))
        sums = re.findall(r"(\d+) plus (\d+) is (\d+)", answer)
        assert len(sums) == 3 and all(int(a) + int(b) == int(c) for a, b, c in sums)
        assert answer.endswith(f" is {one + other}.")
    for _, answer in of_kind("Write the multiplication"):
        products = re.findall(r"(\d+) x (\d+) = (\d+)", answer)
        assert len(products) >= 4 and all(int(a) * int(b) == int(c) for a, b, c in products)


def test_records_and_classes_can_be_read() -> None:
    for question, answer in of_kind("Write as JSON"):
        record = json.loads(answer.removeprefix("```json").removesuffix("```"))
        assert all(str(value) in question for value in record.values())
    for _, answer in of_kind("Write a Python class"):
        (tree,) = ast.parse(answer.removeprefix("```python").removesuffix("```")).body
        assert isinstance(tree, ast.ClassDef)
        methods = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert methods == ["__init__", "__repr__"]


def test_lists_hold_the_words_of_their_questions() -> None:
    for beginning, mark in (("Number these words: ", r"\d+\."), ("Make a list of ", "-")):
        for question, answer in of_kind(beginning):
            asked = re.split(", | and ", question.removeprefix(beginning).removesuffix("."))
            assert re.findall(rf"^{mark} (\w+)$", answer, re.MULTILINE) == asked and len(asked) >= 5


def test_another_text_has_another_fingerprint(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = CORPORA["exercises"].fingerprint()
    changed = tmp_path / "exercises.py"
    changed.write_text("other")
    monkeypatch.setattr(exercises, "__file__", str(changed))
    assert CORPORA["exercises"].fingerprint() != before
