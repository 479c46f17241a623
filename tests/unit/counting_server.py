"""A server in a thread that counts its speculation like vLLM."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from eagle3_ds.eval.counters import BY_POSITION
from tests.unit.fake_answer_server import FakeServer, Reply

NEW = 12
"""Tokens of an answer at most, as the tests ask for them."""


class CountingServer(FakeServer):
    """Answers with NEW tokens, and counts rounds of two guesses: after a prompt of an odd number of tokens
    both are accepted, else the first of every second round.

    Attributes:
        counts: what /metrics shows; None: a server without speculation.
        lag: how often the page shows what was counted before.
        more: called with the counts of a prompt, to change them.
    """

    def __init__(self, tokenizer: Any, name: str, end: int) -> None:
        super().__init__(tokenizer, name, end)
        self.counts: dict[str, float] = dict.fromkeys(
            ("drafts", "draft", "accepted", "p0", "p1", "new", "read", "ended", "first", "decode"), 0.0
        )
        self.shown, self.lag, self.behind = dict(self.counts), 0, 0
        self.speculates, self.counts_at_all = True, True
        self.says = "abcdefghijklmnopqrstuvwxyz"
        self.more: Callable[[dict[str, float]], None] = lambda counts: None
        self.change, self._guard = self._count, threading.Lock()

    def _count(self, answer: dict[str, Any]) -> None:
        [choice] = answer["choices"]
        read, new = len(choice["prompt_token_ids"]), len(choice["token_ids"])
        rounds = max(0, new // 3)
        first, second = (rounds, rounds) if read % 2 else (rounds // 2, 0)
        made: dict[str, float] = {
            "drafts": rounds,
            "draft": 2 * rounds,
            "accepted": first + second,
            "p0": first,
            "p1": second,
        }
        made |= {"new": new, "read": read, "ended": 1, "first": 0.25, "decode": 0.5}
        self.more(made)
        with self._guard:
            for name, value in made.items():
                self.counts[name] += value
            self.behind = self.lag

    def _usual(self, path: str, body: Any, prompt: Any, text: str) -> Reply:
        if path == "/metrics":
            with self._guard:
                self.behind -= 1
                if self.behind < 0:
                    self.shown = dict(self.counts)
                return Reply(200, self._page(self.shown).encode())
        return super()._usual(path, body, prompt, text)

    def _page(self, counts: dict[str, float]) -> str:
        # A name with everything in it that a line is cut at, and two engines.
        label = 'engine="{}",model_name="/a b/{c},position=\\"9\\" x"'
        names = {"generation_tokens": "new", "prompt_tokens": "read"} if self.counts_at_all else {}
        if self.speculates:
            names |= {f"spec_decode_num_{n}": n for n in ("drafts",)}
            names |= {"spec_decode_num_draft_tokens": "draft", "spec_decode_num_accepted_tokens": "accepted"}
        lines = ["# HELP vllm:generation_tokens_total Number of {tokens} 3", "up 1"]
        for engine in (0, 1):
            own = label.replace("{}", str(engine), 1)
            value = {name: count if engine else 0.0 for name, count in counts.items()}
            lines += [f"vllm:{name}_total{{{own}}} {value[key]:e} 17000" for name, key in names.items()]
            lines += [f"vllm:{name}_created{{{own}}} 1.7e9" for name in names]
            if self.counts_at_all:
                lines += [f'vllm:request_success_total{{{own},finished_reason="{r}"}} {v}' for r, v in
                          (("stop", 0.0), ("length", value["ended"]))]  # fmt: skip
                lines += [f"vllm:time_to_first_token_seconds_sum{{{own}}} {value['first']}"]
                lines += [f"vllm:request_decode_time_seconds_sum{{{own}}} {value['decode']}"]
            if self.speculates:
                lines += [f'{BY_POSITION}_total{{{own},position="{k}"}} {value[f"p{k}"]}' for k in (0, 1)]
        return "\n".join(lines) + "\n"
