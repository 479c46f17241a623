"""Seconds and tokens of finding the turns of one conversation and tokenising it, by its number of turns.

Logs of an agent: a question, then calls of a tool and its results in turn, each turn of the same length,
under the templates of three families. Four times the turns should cost four times as much.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.chat import load_chat_template
from eagle3_ds.data.encode import RowEncoder
from eagle3_ds.data.sources import Row
from judge.result_file import FOLDER, print_table, write_result
from tests.unit.chat_families import family_tokenizer

FAMILIES = ("qwen2.5", "qwen3", "mistral")
TURNS = (100, 400, 1600)
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Timing:
    """One conversation: its tokens, and the seconds from row to masked tokens, the best of some repeats."""

    family: str
    turns: int
    tokens: int
    seconds: float


def agent_log(turns: int, words: int) -> dict[str, Any]:
    """A row of so many assistant turns, calls of a tool but for the last."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Mend the failing test."}]
    for number in range(turns - 1):
        call = {
            "name": "read",
            "arguments": {"path": f"src/{number:05d}.py", "first": 10000 + number, "whole": False},
        }
        name = f"call{number:05d}"
        messages += [
            {"role": "assistant", "tool_calls": [{"id": name, "type": "function", "function": call}]},
            {"role": "tool", "name": "read", "tool_call_id": name, "content": f"line {number:05d} " * words},
        ]
    for message in messages[1::2]:
        message["content"] = ""
    return {"messages": [*messages, {"role": "assistant", "content": "Done."}], "tools": [TOOL]}


def run(families: Sequence[str], turns: Sequence[int], words: int, repeats: int) -> list[Timing]:
    """A timing of each family and number of turns."""
    found = []
    for family in families:
        tokenizer = family_tokenizer(family)
        section = DataSection(train=("none",))
        encoder = RowEncoder(tokenizer, load_chat_template(tokenizer), section, len(tokenizer))
        for number in turns:
            row = Row("row", "messages", agent_log(number, words))
            seconds = []
            for _ in range(repeats):
                started = time.perf_counter()
                (tokenised,) = encoder.tokenise([row], Counter())
                seconds.append(time.perf_counter() - started)
            found.append(Timing(family, number, len(tokenised.tokens.input_ids), min(seconds)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenise", description=__doc__)
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS, help="assistant turns")
    parser.add_argument("--words", type=int, default=40, help="words of each tool result, halved")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    found = run(FAMILIES, options.turns, options.words, options.repeats)
    print_table(
        "one agent log, from row to masked tokens",
        ("template", "turns", "tokens", "seconds", "microseconds a token"),
        [
            (one.family, one.turns, one.tokens, f"{one.seconds:.3f}", f"{one.seconds / one.tokens * 1e6:.1f}")
            for one in found
        ],
    )
    body = {"words": options.words, "repeats": options.repeats, "timings": [asdict(one) for one in found]}
    print(write_result("tokenise", "python -m benchmarks.tokenise", body, options.folder))


if __name__ == "__main__":
    main()
