"""Acceptance and speed of a server that drafts, by the length of the prompts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from eagle3_ds.data.answer_server import AnswerServer
from eagle3_ds.eval.counters import Counters, Meter, speculates
from eagle3_ds.eval.intervals import interval_of_counts
from eagle3_ds.patient_http import NoAnswerError, ServerGoneError
from eagle3_ds.say import progress_bar

SGLANG_NAMES = (
    ("spec_accept_token_num", "spec_num_correct_drafts", "spec_accepted_drafts"),
    ("spec_draft_token_num", "spec_num_proposed_drafts", "spec_proposed_drafts"),
    ("spec_accept_histogram", "spec_correct_drafts_histogram"),
)
"""What SGLang tells of a request: guesses that were accepted, guesses, and rounds by the number accepted."""


@dataclass(frozen=True)
class Piece:
    """What some prompts made together: one, or a bucket's where several are asked at a time.

    Attributes:
        prompts, prompt_tokens, new_tokens: how many.
        seconds: from the first request to the last answer.
        counts: of the server.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    counts: Counters


def measure(
    server: AnswerServer,
    prompts: Sequence[list[int]],
    upper_ends: Sequence[int],
    concurrency: int,
    ignore_eos: bool,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a server for the greedy answers to all prompts, bucket by bucket, and read its counters around.

    No request is sent twice: the server would count it twice. None finds the cache of an earlier prompt, so
    times to the first token are of whole prompts.

    Args:
        server: one that is connected, at temperature 0.
        upper_ends: of buckets of prompt lengths, included, ascending; a last bucket has none.
        concurrency: requests in flight.
        ignore_eos: every answer goes to its full length.

    Returns:
        Figures by bucket and in total, as docs/recipe.md lists them for the key `served`.

    Raises:
        ValueError: a request failed, or the server counted something else than these requests.
    """
    meter = Meter(server.client)
    # Answered once before: what a server does at its first request is none of a bucket's time.
    _together(server, meter, [min(prompts, key=len)], 1, ignore_eos, "the warm-up")
    rows, pieces, lower = [], list[Piece](), 0
    with progress_bar(total=len(prompts), desc="answer", unit=" prompts", disable=not progress) as bar:
        for upper in (*upper_ends, None):
            inside = [p for p in prompts if lower < len(p) and (upper is None or len(p) <= upper)]
            found = []
            # One at a time, the counters tell prompts apart; else they tell of the bucket.
            for some in [[prompt] for prompt in inside] if concurrency == 1 else [inside] if inside else []:
                name = f"prompts above {lower} tokens"
                found.append(_together(server, meter, some, concurrency, ignore_eos, name))
                bar.update(len(some))
            rows.append({"above": lower, "up_to": upper, **_figures(found, concurrency)})
            pieces, lower = pieces + found, upper or lower
    total = _figures(pieces, concurrency)
    return {**total, "acceptance_by_context": rows}


@dataclass(frozen=True)
class Answered:
    """One greedy answer of a server.

    Attributes:
        tokens: of the answer.
        seconds: until it was there.
        rounds: in which the draft was asked; None of a server that was asked without one.
        accepted_by_position: rounds in which each guess was accepted.
    """

    tokens: list[int]
    seconds: float
    rounds: int | None = None
    accepted_by_position: tuple[int, ...] = ()


def answer_each(
    server: AnswerServer, prompts: Sequence[list[int]], drafts: bool, progress: bool = True
) -> list[Answered]:
    """Ask a server for the greedy answers to all prompts, one at a time, and what it counted of each: vLLM on
    its page of counters, SGLang beside the answer. End tokens of the model do not end an answer, those of
    `server.stops` do. No request is sent twice, none finds the cache of an earlier prompt.

    Args:
        server: one that is connected, at temperature 0.
        drafts: whether it should speculate.

    Raises:
        ValueError: a request failed, the server speculates or does not, as it should not, or counted
            something else than these requests.
    """
    if not drafts and not server.is_sglang and speculates(server.client):
        raise _drafts_too(server)
    meter = Meter(server.client) if drafts and not server.is_sglang else None
    found = []
    # The shortest once before: what a server does at its first request is none of an answer's time.
    with progress_bar(total=len(prompts) + 1, desc="answer", unit=" prompts", disable=not progress) as bar:
        for number, prompt in enumerate([min(prompts, key=len), *prompts]):
            name = f"prompt {number}" if number else "the warm-up"
            start = time.perf_counter()
            tokens, told = _ask(server, prompt, True, server.stops, name)
            seconds = time.perf_counter() - start
            one = Answered(tokens, seconds)
            if meter is not None:
                counts = meter.took(1, len(prompt), len(tokens))
                one = Answered(tokens, seconds, counts.rounds, counts.accepted_by_position)
            elif drafts:
                one = Answered(tokens, seconds, *_told_rounds(told, server.client.url))
            elif "spec_verify_ct" in told:
                raise _drafts_too(server)
            found.append(one)
            bar.update(1)
    return found[1:]


def _drafts_too(server: AnswerServer) -> ValueError:
    return ValueError(
        f"--plain-server {server.client.url} speculates too: its answers and its speed are not those of the "
        "target alone. Start it without a draft."
    )


def _told_rounds(told: Mapping[str, Any], url: str) -> tuple[int, tuple[int, ...]]:
    """Rounds and accepted guesses by position, as SGLang tells them of a request. Its names have changed."""
    rounds = told.get("spec_verify_ct")
    if rounds is None:
        raise ValueError(
            f"--server {url} does not speculate: its answers have no spec_verify_ct. Start it with the "
            "draft, as serve.md beside an export says: --speculative-algorithm EAGLE3."
        )
    values = [next((told[name] for name in names if name in told), None) for names in SGLANG_NAMES]
    accepted, guessed, histogram = values
    if not rounds:
        return 0, ()
    if accepted is None or guessed is None or histogram is None:
        missing = ", ".join(
            names[0] for names, value in zip(SGLANG_NAMES, values, strict=True) if value is None
        )
        raise ValueError(
            f"--server {url}: this SGLang tells no {missing} with its answers, so nothing can be said by "
            "position. Use a version that does."
        )
    if sum(histogram) != rounds or sum(n * count for n, count in enumerate(histogram)) != accepted:
        raise ValueError(
            f"--server {url} contradicts itself: {rounds} rounds and {accepted} accepted guesses, but by the "
            f"number accepted {list(histogram)} rounds. Its figures are of no use."
        )
    return rounds, tuple(sum(histogram[place + 1 :]) for place in range(guessed // rounds))


def _together(
    server: AnswerServer,
    meter: Meter,
    prompts: Sequence[list[int]],
    concurrency: int,
    ignore_eos: bool,
    name: str,
) -> Piece:
    """Ask for some prompts, `concurrency` at a time, and read what was counted meanwhile."""
    start = time.perf_counter()
    if len(prompts) == 1:
        answers = [_answer(server, prompts[0], ignore_eos, name)]
    else:
        pool = ThreadPoolExecutor(concurrency)
        try:
            answers = list(pool.map(lambda prompt: _answer(server, prompt, ignore_eos, name), prompts))
        finally:
            pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - start
    read, new = sum(map(len, prompts)), sum(map(len, answers))
    return Piece(len(prompts), read, new, seconds, meter.took(len(prompts), read, new))


def _answer(server: AnswerServer, prompt: list[int], ignore_eos: bool, name: str) -> list[int]:
    return _ask(server, prompt, ignore_eos, [], name)[0]


def _ask(
    server: AnswerServer, prompt: list[int], ignore_eos: bool, stops: Sequence[int], name: str
) -> tuple[list[int], Mapping[str, Any]]:
    """An answer, and what the server tells beside. `stops`: tokens that end it in spite of `ignore_eos`."""
    more: dict[str, Any] = {"cache_salt": token_hex(16)}
    if ignore_eos:
        # An end token that the request names ends an answer in spite of ignore_eos.
        more |= {"ignore_eos": True, "stop_token_ids": list(stops)}
    try:
        return server.answer_and_told(prompt, None, 1, more)
    except ServerGoneError as error:
        raise ServerGoneError(f"{name}, a prompt of {len(prompt)} tokens: {error}") from error
    except NoAnswerError as error:
        raise ValueError(
            f"--server {server.client.url}: {name}, a prompt of {len(prompt)} tokens: {error}. Its counters "
            "are of no use after that, and no figure was written: look at the server's log, and start again."
        ) from error


def _figures(pieces: Sequence[Piece], concurrency: int) -> dict[str, Any]:
    """Acceptance and speed of some pieces. Acceptance length: 1 + accepted / rounds, as servers count it."""
    counts = [piece.counts for piece in pieces]
    rounds, accepted = (sum(getattr(one, name) for one in counts) for name in ("rounds", "accepted"))
    prompts, new = sum(piece.prompts for piece in pieces), sum(piece.new_tokens for piece in pieces)
    seconds = sum(piece.seconds for piece in pieces)
    first = _sum([one.first_token_seconds for one in counts])
    decoding = _sum([one.decoding_seconds for one in counts])
    places = [sum(place) for place in zip(*(one.accepted_by_position for one in counts), strict=True)]
    return {
        "prompts": prompts,
        "prompt_tokens": sum(piece.prompt_tokens for piece in pieces),
        "new_tokens": new,
        "rounds": rounds,
        "guessed": sum(one.guessed for one in counts),
        "accepted": accepted,
        "acceptance_length": 1 + accepted / rounds if rounds else None,
        "interval": interval_of_counts(
            [one.rounds + one.accepted for one in counts], [one.rounds for one in counts]
        )
        if concurrency == 1
        else None,
        "acceptance_by_position": [
            {"position": place, "accepted": count / rounds if rounds else None}
            for place, count in enumerate(places, 1)
        ],
        "seconds": seconds,
        "tokens_per_second": new / seconds if seconds else None,
        "first_token_seconds": None if first is None or not prompts else first / prompts,
        # The first token of an answer comes with the reading of the prompt.
        "decoding_tokens_per_second": (new - prompts) / decoding if decoding and new > prompts else None,
    }


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one is None or none is there."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def prompts_fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of the prompts' tokens in the order of their text, so that the same prompts have the same."""
    return hashlib.sha256(json.dumps(sorted(map(list, prompts))).encode()).hexdigest()
