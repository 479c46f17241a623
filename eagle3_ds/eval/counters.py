"""What a running vLLM has counted, from its page /metrics in the text form of Prometheus, and the differences
that the requests of one client made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from eagle3_ds.patient_http import NoAnswerError, PatientClient

# A line of a value; labels may hold anything between quotes.
LINE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?\s*")
POSITION = re.compile(r'(?:^|,)position="(\d+)"')
ROUNDS = "vllm:spec_decode_num_drafts"
GUESSED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
NEW, READ, ENDED = "vllm:generation_tokens", "vllm:prompt_tokens", "vllm:request_success"
FIRST_TOKEN, DECODING = "vllm:time_to_first_token_seconds_sum", "vllm:request_decode_time_seconds_sum"
SETTLE_SECONDS, STILL_SECONDS, POLL_SECONDS = 10.0, 0.5, 0.02
"""How long the counters may stay behind the answers; how long they must stand still before we begin; between
two looks at them.
"""


@dataclass(frozen=True)
class Counters:
    """Counts up to one moment, or between two of them.

    Attributes:
        rounds, guessed, accepted, accepted_by_position: of speculation.
        new_tokens, read_tokens, requests: tokens of answers, of prompts, and requests that ended.
        first_token_seconds, decoding_seconds: summed over requests; None where they are not counted.
    """

    rounds: int
    guessed: int
    accepted: int
    accepted_by_position: tuple[int, ...]
    new_tokens: int
    read_tokens: int
    requests: int
    first_token_seconds: float | None
    decoding_seconds: float | None

    def __sub__(self, other: Counters) -> Counters:
        def less(one: float | None, before: float | None) -> float | None:
            return None if one is None or before is None else one - before

        places = zip(self.accepted_by_position, other.accepted_by_position, strict=True)
        return Counters(
            self.rounds - other.rounds,
            self.guessed - other.guessed,
            self.accepted - other.accepted,
            tuple(one - before for one, before in places),
            self.new_tokens - other.new_tokens,
            self.read_tokens - other.read_tokens,
            self.requests - other.requests,
            less(self.first_token_seconds, other.first_token_seconds),
            less(self.decoding_seconds, other.decoding_seconds),
        )


def read_counters(client: PatientClient) -> Counters:
    """What the server has counted up to now, summed over its engines.

    Raises:
        ValueError: there is no such page, or it is not that of a vLLM that speculates.
    """
    try:
        text: str = client.request("GET", "/metrics", None, str, is_text=True)
    except NoAnswerError as error:
        raise ValueError(f"--server {client.url}: /metrics, where its counters are: {error}.") from error
    return parse_counters(text, client.url)


def speculates(client: PatientClient) -> bool:
    """Whether a vLLM has counters of speculation; False too where it has no page of counters."""
    try:
        text: str = client.request("GET", "/metrics", None, str, tries=1, is_text=True)
    except ValueError:
        return False
    return any(line.startswith(ROUNDS) for line in text.splitlines())


def parse_counters(text: str, url: str) -> Counters:
    """The counters in a page. `url`: for messages."""
    values: dict[str, float] = {}
    places: dict[int, float] = {}
    for line in text.splitlines():
        found = None if line.startswith("#") else LINE.fullmatch(line)
        if found is None:
            continue
        # A counter's name ends in _total on the page, and not in vLLM's source.
        name = found["name"].removesuffix("_total")
        position = POSITION.search(found["labels"] or "") if name == BY_POSITION else None
        if position is not None:
            place = int(position[1])
            places[place] = places.get(place, 0.0) + float(found["value"])
        else:
            values[name] = values.get(name, 0.0) + float(found["value"])
    _check_names(values, places, url)
    return Counters(
        rounds=int(values[ROUNDS]),
        guessed=int(values[GUESSED]),
        accepted=int(values[ACCEPTED]),
        accepted_by_position=tuple(int(places[place]) for place in sorted(places)),
        new_tokens=int(values[NEW]),
        read_tokens=int(values[READ]),
        requests=int(values[ENDED]),
        first_token_seconds=values.get(FIRST_TOKEN),
        decoding_seconds=values.get(DECODING),
    )


def _check_names(values: Mapping[str, float], places: Mapping[int, float], url: str) -> None:
    if any(name not in values for name in (NEW, READ, ENDED)):
        raise ValueError(
            f"--server {url}: its /metrics has no counters of vLLM ({NEW}, {READ}, {ENDED}). Name a vLLM "
            "server, one that was not started with --disable-log-stats, and not a router before several."
        )
    if any(name not in values for name in (ROUNDS, GUESSED, ACCEPTED)) or not places:
        raise ValueError(
            f"--server {url} does not speculate: its /metrics has no {ROUNDS}. Start it with the draft, as "
            'serve.md beside an export says: vllm serve TARGET --speculative-config \'{"method": "eagle3", '
            '"model": DRAFT, "num_speculative_tokens": N}\'.'
        )


class Meter:
    """Takes the difference that some requests made, and sees that nobody else made one.

    Args:
        client: of the server.
        settle: seconds that the counters may stay behind the answers.
        still: seconds over which they must not move at first.

    Raises:
        ValueError: there are no counters of speculation, or they move although nobody asks.
    """

    def __init__(
        self, client: PatientClient, settle: float = SETTLE_SECONDS, still: float = STILL_SECONDS
    ) -> None:
        self._client, self._settle = client, settle
        self._before = read_counters(client)
        deadline = time.monotonic() + settle
        while True:
            time.sleep(still)
            now = read_counters(client)
            if now == self._before:
                return
            if time.monotonic() > deadline:
                raise self._refusal("counts although we ask nothing: another client asks this server")
            self._before = now

    def took(self, requests: int, read_tokens: int, new_tokens: int) -> Counters:
        """What was counted since the last call: these many requests with so many tokens.

        Raises:
            ValueError: something else was counted.
        """
        deadline = time.monotonic() + self._settle
        expected = (requests, read_tokens, new_tokens)
        while True:
            now = read_counters(self._client)
            if len(now.accepted_by_position) != len(self._before.accepted_by_position):
                raise self._refusal("was started anew with another number of guesses")
            since = now - self._before
            counted = (since.requests, since.read_tokens, since.new_tokens)
            if counted == expected:
                self._before = now
                return since
            if min(counted) < 0:
                raise self._refusal("counts from the beginning again: it was restarted")
            if any(one > wanted for one, wanted in zip(counted, expected, strict=True)):
                raise self._refusal(f"{self._told(counted, expected)}: another client asks this server")
            if time.monotonic() > deadline:
                raise self._refusal(
                    f"{self._told(counted, expected)}: this page is of one of several servers behind the URL"
                )
            time.sleep(POLL_SECONDS)

    def _told(self, counted: tuple[int, ...], expected: tuple[int, ...]) -> str:
        forms = [
            f"{one} requests, {two} prompt tokens, {three} new tokens"
            for one, two, three in (counted, expected)
        ]
        return f"counted {forms[0]}, where we sent and received {forms[1]}"

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"--server {self._client.url} {what}. Its acceptance would not be that of our prompts: measure a "
            "single vLLM server that nobody else uses meanwhile."
        )
