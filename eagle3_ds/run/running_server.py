"""Whether a draft serves as it was trained by a server that runs already, and has it loaded: its answers, and
what it accepts, against the target's own decoding and our own evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eagle3_ds.data.answer_server import AnswerServer
from eagle3_ds.eval.served import Answered, answer_each
from eagle3_ds.run.regeneration import Serving
from eagle3_ds.run.serve_check import (
    NAMES,
    RECORDED,
    WITHOUT,
    Check,
    Report,
    by_position,
    decode_here,
    judge,
    judge_recorded,
    other_settings,
)
from eagle3_ds.run.served_evaluation import connect
from eagle3_ds.targets import load_text_config, load_tokenizer, resolve_path

logger = logging.getLogger(__name__)
RUNNING = "the server"


def check_running(
    check: Check, serving: Serving, plain: Serving | None, tolerance: float, progress: bool = True
) -> Report:
    """Let a running server answer every prompt, one at a time, and compare.

    Without `plain`, the target is loaded here: its own answers, and the rounds of the export, of as many
    guesses as the server makes, are what the server's are held against, to the full length. With it, nothing
    of the target but config and tokenizer is read here: its answers are the plain server's, its acceptance is
    that in eval.json, and texts end at the end token, as an evaluation's do.

    Args:
        serving: the server with the draft.
        plain: one of the same target without it; None decodes here.
        tolerance: how far the server's acceptance length may be from ours, relative.

    Raises:
        ValueError: a server cannot be reached, has another model, speculates or does not, as it should not,
            was asked by others meanwhile, or there is no evaluation to compare with.
    """
    if plain is not None:
        _check_recorded(check, serving, plain)
    config = load_text_config(resolve_path(check.target.path))
    tokenizer = load_tokenizer(check.target)
    stops = [] if plain is None else [tokenizer.eos_token_id]
    sizes = (check.max_new_tokens, config.vocab_size)
    server = connect(serving, check.target.path, tokenizer, stops, *sizes)
    alone = None if plain is None else connect(plain, check.target.path, tokenizer, stops, *sizes)
    for one in (server, alone):
        _check_room(check, one)
    prompts = [list(prompt) for prompt in check.prompts]
    answers = answer_each(server, prompts, drafts=True, progress=progress)
    if alone is None:
        return _against_ours(check, answers, tolerance)
    own = answer_each(alone, prompts, drafts=False, progress=progress)
    return _against_plain(check, answers, own, tolerance)


def _check_recorded(check: Check, serving: Serving, plain: Serving) -> None:
    """Raises ValueError unless eval.json has figures that the server's can be held against."""
    if plain.url.rstrip("/") == serving.url.rstrip("/"):
        raise ValueError(
            f"--plain-server {plain.url} is --server too. Name a second one, which has the target alone."
        )
    if check.recorded is None:
        raise ValueError(
            "--plain-server: nothing of our own is decoded here then, and there is no eval.json of a run to "
            "hold acceptance against. Name the RECIPE of a run that was evaluated, or leave --plain-server "
            "out, and the target is loaded here."
        )
    other = [told for told in other_settings(check) if not told.startswith("dtype ")]
    if other or check.recorded["acceptance_length"] is None:
        why = ", ".join(other) or "every text ended before the draft was asked"
        raise ValueError(
            f"--plain-server: acceptance cannot be held against eval.json: {why}. Run `evaluate` with the "
            "settings of this check, or leave --plain-server out, and the target is loaded here."
        )


def _check_room(check: Check, server: AnswerServer | None) -> None:
    """Raises ValueError where a prompt and its answer do not fit the server."""
    context = None if server is None else server.served.context
    if server is None or context is None:
        return
    longest = max(map(len, check.prompts)) + check.max_new_tokens + check.draft_tokens + 1
    if longest > context:
        raise ValueError(
            f"--server {server.client.url} takes {context} tokens; the longest prompt with "
            f"eval.max_new_tokens {check.max_new_tokens} and a round of guesses are {longest}. Start it with "
            "a larger --max-model-len, or lower eval.max_new_tokens."
        )


def _found(answers: Sequence[Answered]) -> dict[str, Any]:
    """Answers in the form in which serving/decode.py gives them."""
    counts = [
        None
        if one.rounds is None
        else {"rounds": one.rounds, "accepted_by_position": list(one.accepted_by_position)}
        for one in answers
    ]
    return {
        "answers": [one.tokens for one in answers],
        "seconds": [one.seconds for one in answers],
        "counts": counts,
    }


def _guesses(answers: Sequence[Answered], check: Check) -> int:
    """How many tokens the server guesses in a round; told where it is another number than the recipe's."""
    guesses = max(len(one.accepted_by_position) for one in answers) or check.draft_tokens
    if guesses != check.draft_tokens:
        logger.warning(
            "the server guesses %d tokens in a round, eval.draft_tokens is %d: we decode with its number",
            guesses,
            check.draft_tokens,
        )
    return guesses


def _against_ours(check: Check, answers: Sequence[Answered], tolerance: float) -> Report:
    """Load the target here, and decode with one export: all hold the same weights."""
    layout = "vllm" if "vllm" in check.drafts else next(iter(check.drafts))
    ours = replace(check, drafts={layout: check.drafts[layout]}, draft_tokens=_guesses(answers, check))
    expected, rounds = decode_here(ours)
    shares = by_position(rounds[NAMES[layout]], ours.draft_tokens)
    ways = [judge(RUNNING, _found(answers), expected, shares, tolerance)]
    if check.recorded is not None:
        ways.append(judge_recorded(ours, rounds.get(RECORDED), tolerance))
    return Report(tuple(ways))


def _against_plain(
    check: Check, answers: Sequence[Answered], own: Sequence[Answered], tolerance: float
) -> Report:
    """Hold answers against a second server's, and acceptance against the run's eval.json."""
    assert check.recorded is not None
    expected = [one.tokens for one in own]
    alone = judge(WITHOUT, _found(own), expected, None, tolerance)
    guesses = _guesses(answers, check)
    if guesses != check.draft_tokens:
        raise ValueError(
            f"the server guesses {guesses} tokens in a round and eval.draft_tokens is {check.draft_tokens}: "
            "its acceptance is not that in eval.json. Start it with as many."
        )
    recorded = [row["accepted"] for row in check.recorded["acceptance_by_position"]]
    meaning = "the server runs another draft than was evaluated"
    return Report((alone, judge(RUNNING, _found(answers), expected, recorded, tolerance, meaning)))
