"""Both layouts in a real vLLM: what it answers is the target's own text, and what it accepts of the draft is,
prompt for prompt and position for position, what our own decoding accepts.

vLLM was written by others: an equal count of every position of every prompt says that its draft reads the
same hidden states at the same rotary positions through the same tensors as the one that is trained here.
"""

from __future__ import annotations

from typing import Any

import pytest

from eagle3_ds.eval import Round
from tests.served.judged import CASES, TARGETS, VARIANTS, Bench, Serve
from tests.served.pairs import DRAFT_TOKENS, Pair


def counted(rounds: list[Round]) -> dict[str, Any]:
    """Our rounds of one prompt as vLLM counts them."""
    return {
        "rounds": len(rounds),
        "guessed": len(rounds) * DRAFT_TOKENS,
        "accepted": sum(each.accepted for each in rounds),
        "accepted_by_position": [
            sum(each.accepted > position for each in rounds) for position in range(DRAFT_TOKENS)
        ],
    }


@pytest.mark.parametrize(("target", "draft", "way"), CASES, ids=map(", ".join, CASES))
def test_vllm_answers_and_accepts_as_we_do(
    target: str, draft: str, way: str, serve: Serve, bench: Bench
) -> None:
    pair: Pair = bench.pairs(target)[draft]
    found = bench.answers(target, serve)[f"{draft}, {way}"]
    assert "error" not in found, found["error"]
    assert found["answers"] == pair.answers, "the target's own greedy text"
    assert found["counts"] == [counted(rounds) for rounds in pair.rounds]
    accepted, guessed = (sum(each[name] for each in found["counts"]) for name in ("accepted", "guessed"))
    assert 0.02 < accepted / guessed < 0.9, "a draft that is always or never right would prove little"


def test_every_target_has_a_draft() -> None:
    assert {target for target, _ in VARIANTS} == set(TARGETS)
