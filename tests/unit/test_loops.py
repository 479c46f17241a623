"""Texts that go round in circles: told in an evaluation, its report and `data inspect`."""

from __future__ import annotations

from typing import Any

import pytest

from eagle3_ds.data.inspect import Inspection
from eagle3_ds.data.loops import loops, repeated_share
from eagle3_ds.data.token_mask import MaskedTokens
from eagle3_ds.eval import Round, loop_warning
from eagle3_ds.eval.evaluate import _loop_figures
from eagle3_ds.eval.report import _without_loops

PROSE = list(range(64))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 64, True),
        ([1, 2] * 32, True),
        (list(range(10)) * 6, True),
        (PROSE[:20] + [5, 6, 7] * 14, True),
        (PROSE, False),
        ([7] * 15, False),
        ([], False),
        ([3, *PROSE[:30], 3, *PROSE[30:50]], False),
        (PROSE[:40] + PROSE[:20], False),
    ],
)
def test_what_is_a_loop(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected and 0.0 <= repeated_share(tokens) < 1.0


def result(answers: list[list[int]]) -> dict[str, Any]:
    """Four tokens per round in a loop, two in other texts."""
    trained = [[Round(9, 3, 3, 4)] * 5 if loops(answer) else [Round(9, 2, 1, 2)] * 5 for answer in answers]
    untrained = [[Round(9, 1, 0, 1)] * 5 for _ in answers]
    figures = _loop_figures(answers, {"trained": trained, "untrained": untrained, "ngram": untrained})
    return figures | {"prompts": len(answers)}


@pytest.mark.parametrize("loop", [[7] * 64, [1, 2, 3] * 20, PROSE[:9] * 7])
def test_the_figure_without_the_loops(loop: list[int]) -> None:
    found = result([loop, PROSE, loop])
    assert found["looping_prompts"] == 2 and found["repeated_ngrams"] > 0.5
    assert found["acceptance_length_without_loops"] == 2.0
    assert found["acceptance_length_untrained_without_loops"] == 1.0
    assert (
        "2 of the target's 3 greedy answers" in (told := loop_warning(found) or "") and "2.00 without" in told
    )
    assert "2 of 3 answers loop,\nwithout them 2.00" in _without_loops(found)


def test_nothing_is_said_without_loops_and_of_older_results() -> None:
    found = result([PROSE, PROSE[::-1]])
    assert (found["looping_prompts"], found["repeated_ngrams"]) == (0, 0.0)
    assert loop_warning(found) is None and loop_warning({}) is None and _without_loops(found) == ""


def test_where_every_answer_loops_no_figure_is_left() -> None:
    found = result([[7] * 64, [8] * 64])
    assert found["acceptance_length_without_loops"] is None
    assert "no other answer is left to judge by" in (loop_warning(found) or "")
    assert "without them none" in _without_loops(found)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([[7] * 40], "warning: 1 of 1 stretches go round in circles"),
        ([PROSE, [1, 2, 3] * 12], "warning: 1 of 2 stretches"),
        ([[1, 2] * 20, [3] * 30], "warning: 2 of 2 stretches"),
        ([PROSE, PROSE], None),
    ],
)
def test_an_inspected_row_that_loops(answers: list[list[int]], words: str | None) -> None:
    ids, mask = list[int](), list[bool]()
    for answer in answers:
        ids += [90, 91, *answer]
        mask += [False, False, *[True] * len(answer)]
    summary = Inspection("row 1", MaskedTokens(ids, mask, cut=False), [("", True)]).summary
    assert words in summary if words else "warning" not in summary
