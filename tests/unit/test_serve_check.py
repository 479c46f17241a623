"""What serve-check concludes from answers and counts, and what it refuses before a server starts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.eval import Round
from eagle3_ds.run import serve_check
from eagle3_ds.run.serve_check import (
    NEVER_ASKED,
    WARNING,
    WITHOUT,
    Check,
    by_position,
    decode_here,
    judge,
    judge_recorded,
    run_check,
    server_python,
    sglang_command,
)
from eagle3_ds.serving.decode import difference

CHECK = Check(
    TargetSection(path="target"), {"vllm": Path("draft")}, [[1, 2], [3]], 4, 2, "float32", recorded=None
)
EXPECTED = [[5, 6, 7, 8], [9, 9, 9, 9]]
ROUNDS = [Round(3, 2, 1, 2), Round(5, 2, 2, 3), Round(2, 1, 0, 1), Round(3, 2, 1, 2)]
SHARES = by_position(ROUNDS, 2)
COUNTS = [
    {"rounds": 2, "guessed": 4, "accepted": 3, "accepted_by_position": [2, 1]},
    {"rounds": 2, "guessed": 4, "accepted": 1, "accepted_by_position": [1, 0]},
]


def found(**changes: Any) -> dict[str, Any]:
    return {"answers": EXPECTED, "seconds": [1.0, 3.0], "counts": COUNTS, **changes}


def test_equal_answers_and_counts_serve_as_trained() -> None:
    served = judge("vLLM layout", found(), EXPECTED, SHARES, 0.0)
    assert not served.failures
    assert served.acceptance_length == (2.0, 2.0) and served.tokens_per_second == 2.0
    assert served.accepted == ((0.75, 0.75), (0.25, 0.25))


def test_each_failure_is_named() -> None:
    other = judge("w", found(answers=[[5, 6, 1, 8], EXPECTED[1]]), EXPECTED, SHARES, 0.0)
    assert "1 of 2 answers are not the target's own; prompt 1 differs from new token 3" in other.failures[0]
    short = judge("w", found(answers=[EXPECTED[0], [9]]), EXPECTED, SHARES, 0.0)
    assert "prompt 2 differs from new token 2" in short.failures[0]
    worse = [{"rounds": 4, "guessed": 8, "accepted": 1, "accepted_by_position": [1, 0]}, COUNTS[1]]
    low = judge("w", found(counts=worse), EXPECTED, SHARES, 0.02)
    assert low.failures[0].startswith("acceptance length 1.333, our decoding of the same export has 2.000")
    assert not judge("w", found(counts=worse), EXPECTED, SHARES, 0.5).failures
    moved = [{**COUNTS[0], "accepted_by_position": [1, 2]}, COUNTS[1]]
    swapped = judge("w", found(counts=moved), EXPECTED, SHARES, 0.02)
    assert swapped.failures[0].startswith("guess 1 is accepted in 0.500 of all rounds, in our decoding")
    refused = judge("w", {"error": "ValueError: no such layer"}, EXPECTED, SHARES, 0.0)
    assert refused.failures == ("does not load: ValueError: no such layer",)
    asleep = judge("w", found(counts=[None, None]), EXPECTED, SHARES, 1.0)
    assert asleep.failures == ("the server never asked the draft",)


EVALUATION = {
    "prompts": 2,
    "draft_tokens": 2,
    "max_new_tokens": 4,
    "dtype": "float32",
    "acceptance_length": 2.0,
    "acceptance_by_position": [{"accepted": 0.75}, {"accepted": 0.25}],
}


def recorded(**changes: Any) -> Check:
    return replace(CHECK, recorded={**EVALUATION, **changes})


def test_the_evaluation_of_the_run_is_held_against_its_export() -> None:
    same = judge_recorded(recorded(), ROUNDS, 0.0)
    assert not same.failures and same.acceptance_length == (2.0, 2.0)
    assert same.accepted == ((0.75, 0.75), (0.25, 0.25))
    better = judge_recorded(recorded(acceptance_length=2.1), ROUNDS, 0.02)
    assert "what was exported is not what was evaluated" in better.failures[0]
    other = judge_recorded(recorded(draft_tokens=7, prompts=16), None, 0.0)
    assert not other.failures and other.note.endswith("prompts is 16, here 2, draft_tokens is 7, here 2")
    assert judge_recorded(recorded(acceptance_length=None), [], 0.0).note.startswith("has no acceptance")


def test_a_text_stops_with_its_end_token_and_its_last_round_counts_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first text ends with the last token of a round, the other within one."""
    answers = [[5, 0, 7, 8], [9, 0, 9, 9]]
    rounds = [[Round(3, 1, 0, 1)], [Round(2, 2, 2, 3)]]
    behind = [Round(4, 2, 1, 2)]
    target = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0))
    monkeypatch.setattr(serve_check, "load_target", lambda *_: target)
    monkeypatch.setattr(serve_check, "decode_alone", lambda _, prompt, *__: answers[len(prompt) == 1])
    asked: list[Any] = []

    def of_prompts(check: Check, target: Any, folder: Path, expected: Any, guesses: int, end: Any = None):
        asked.append((expected, end))
        return [rounds[0] + behind, rounds[1]]

    monkeypatch.setattr(serve_check, "_rounds", of_prompts)
    expected, found = decode_here(recorded(), ended=True)
    assert expected == [[5, 0], [9, 0]]
    assert found["vLLM layout"] == rounds[0] + rounds[1]
    # The rounds of a server are those of the whole text; the evaluation's are of texts that end.
    assert asked == [(answers, None), (expected, 0)]
    whole, found = decode_here(CHECK)
    assert whole == answers and found["vLLM layout"] == rounds[0] + behind + rounds[1]


def test_drafts_that_are_never_asked_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is one token, which ends it."""
    short = [[0], [0]]
    answers = {name: found(answers=short, counts=[None, None]) for name in (WITHOUT, "vLLM layout")}
    monkeypatch.setattr(serve_check, "decode_here", lambda *_, **__: (short, {"vLLM layout": []}))
    monkeypatch.setattr(serve_check, "_decode_there", lambda *_: (answers, tmp_path / "log"))
    (tmp_path / "log").write_text("")
    report = run_check(CHECK, sys.executable, 0.0, tmp_path)
    assert not report.failures and report.ways[1].note == NEVER_ASKED


def test_a_server_that_dies_fails_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eagle3_ds.run.serve_check.decode_here", lambda *_, **__: (EXPECTED, {"vLLM layout": ROUNDS})
    )
    monkeypatch.setattr(serve_check, "resolve_path", lambda path: tmp_path)
    monkeypatch.setattr(serve_check, "load_tokenizer", lambda target: SimpleNamespace(eos_token_id=0))
    report = run_check(CHECK, sys.executable, 0.0, tmp_path / "out")  # this Python has no vLLM
    assert len(report.failures) == 2 and all("does not load" in failure for failure in report.failures)
    assert report.log is not None and "No module named 'vllm'" in report.log.read_text()


def test_counters_are_taken_from_one_prompt_to_the_next() -> None:
    before, after = ({"rounds": 3, "by": [2, 1]}, {"rounds": 5, "by": [4, 1]})
    assert difference(before, after) == {"rounds": 2, "by": [2, 0]}
    assert difference({}, after) == after
    assert difference({}, {}) is None


def test_warnings_are_found_in_the_log() -> None:
    when = "11-26 00:37:15 [a.py:1]"
    lines = [
        f"(EngineCore pid=1) WARNING {when} no memory",
        f"WARNING {when} Traceback (most recent call last):",
        f"WARNING {when}   File x, line 1",
        f"ERROR {when} ValueError: no",
        f"INFO {when} x",
    ]
    assert [match[1] for match in WARNING.finditer("\n".join(lines))] == ["no memory", "ValueError: no"]


def test_what_is_refused_before_a_server_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--python: .*absent is no Python that has vLLM"):
        server_python(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="is no Python that has vLLM"):
        server_python(sys.executable)
    assert main(["serve-check"]) == 2
    assert main(["serve-check", "recipe.yaml", "--target", "t", "--draft", "d"]) == 2
    assert main(["serve-check", "--target", "t"]) == 2
    assert "give a RECIPE, or --target T and --draft D" in capsys.readouterr().err


def test_sglang_command() -> None:
    assert "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3" in str(
        sglang_command(CHECK)
    )
    assert sglang_command(replace(CHECK, algorithm="dflash")) is None
