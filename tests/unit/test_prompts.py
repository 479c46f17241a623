"""Prompts from files, and prompts of a wanted length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from eagle3_ds.data.long_context import COLUMNS, longbench_prompts, ruler_prompts
from eagle3_ds.data.prompts import prompt_tokens, read_prompts_file

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Bytes:
    """A tokenizer of bytes."""

    name_or_path = "bytes"
    special_tokens_map: Mapping[str, str] = MappingProxyType({})
    added_tokens_decoder: Mapping[int, str] = MappingProxyType({})
    all_special_tokens = ()

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def said(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def words(text: str) -> list[int]:
    """A token for each word."""
    return [len(word) for word in text.split()]


def test_rows_of_prompts() -> None:
    plain, chat = Bytes(), Bytes(TEMPLATE)
    assert prompt_tokens(plain, {"input_ids": [4, 5]}, "row 1") == [4, 5]
    assert said(prompt_tokens(plain, {"prompt": "ab"}, "row 1")) == "ab"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said(prompt_tokens(plain, {"messages": talk}, "row 1")) == "a"
    # A trace of an agent: what stands before the last answer, with its tools.
    trace = [*talk, {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": trace, "tools": tools}
    assert said(prompt_tokens(chat, row, "row 1")) == "<user>a<assistant>b<tool>c[look]<assistant>"


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"text": "a"}, "has none of messages, prompt and input_ids"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1.5]}, "no list of token ids"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message stands before"),
        ({"messages": "a"}, "expected a list of messages"),
        ([1], "is no JSON object"),
        ("{half", "not valid JSON"),
    ],
)
def test_a_bad_row_is_named(row: Any, rule: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    bad = row if row == "{half" else json.dumps(row)
    file.write_text(json.dumps({"prompt": "a b"}, ensure_ascii=False) + "\n\n" + bad + "\n")
    with pytest.raises(ValueError, match=rf"p.jsonl, row 3.*{rule}"):
        read_prompts_file(file, Bytes(TEMPLATE))
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no row"):
        read_prompts_file(file, Bytes())


def test_a_line_may_hold_what_python_takes_for_its_end(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", "utf-8")
    assert [said(tokens) for tokens in read_prompts_file(tmp_path / "p.jsonl", Bytes())] == ["a\u2028b"]


def test_prompts_have_the_wanted_length_and_hold_their_answer() -> None:
    texts: list[str] = []

    def tokenize(text: str) -> list[int]:
        texts.append(text)
        return words(text)

    for length in (400, 3000, 20000):
        prompts = ruler_prompts(tokenize, length, 4, 7)
        # A sentence of the filler has at most 11 words.
        assert all(length - 11 < len(prompt) <= length for prompt in prompts), [*map(len, prompts)]
        assert len({tuple(prompt) for prompt in prompts}) == 4
        assert prompts == ruler_prompts(words, length, 4, 7) != ruler_prompts(words, length, 4, 8)
        assert prompts[:2] == ruler_prompts(words, length, 2, 7)
    longest = max(texts, key=len)
    assert longest.count("The code of ") == 8 or longest.count("VAR ") == 18
    # The longest texts were tried and found too long by no more than judging needs.
    assert len(texts) < 200
    with pytest.raises(ValueError, match="ruler:20: the shortest task has .* Give a length of"):
        ruler_prompts(words, 20, 1, 7)


def test_needles_lie_in_order_all_over_the_text() -> None:
    texts: dict[int, str] = {}

    def tokenize(text: str) -> list[int]:
        texts[len(words(text))] = text
        return words(text)

    [look_up, variables] = ruler_prompts(tokenize, 4000, 2, 0)
    text = texts[len(look_up)] if "codes" in texts[len(look_up)] else ""
    places = [index / len(text) for index in range(len(text)) if text.startswith("The code of", index)]
    assert len(places) == 8 and min(places) < 0.4 and max(places) > 0.6
    asked = text.rpartition("the codes of: ")[2].split(", ")
    assert len(asked) == 4 and all(f"The code of {name} is " in text for name in asked)
    text = texts[len(variables)]
    steps = [line.split() for line in text.split("VAR ") if " = " in line]
    assert len(variables) != len(look_up) and text.startswith("The text assigns") and len(steps) == 10


def longbench(folder: Path, **more: str) -> Path:
    folder.mkdir()
    rows = [
        {**{name: f"{name} {n}" for name in COLUMNS}, "context": "word " * (50 * n), "answer": "A", **more}
        for n in range(1, 7)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_longbench_from_a_folder(tmp_path: Path) -> None:
    texts: list[str] = []

    def tokenize(text: str) -> list[int]:
        texts.append(text)
        return words(text)

    place = str(longbench(tmp_path / "copy"))
    prompts, passed_over = longbench_prompts(tokenize, 3, 0, None, place)
    assert len(prompts) == 3 and passed_over == 0
    assert (
        prompts
        == longbench_prompts(words, 3, 0, None, place)[0]
        != longbench_prompts(words, 3, 1, None, place)[0]
    )
    assert "question: question " in texts[0] and "\n(D) choice_D " in texts[0]
    short, passed_over = longbench_prompts(words, 6, 0, 200, place)
    assert len(short) + passed_over == 6 and passed_over > 0 and max(map(len, short)) <= 200


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.jsonl").write_text(json.dumps({"context": "a"}) + "\n")
    with pytest.raises(ValueError, match="columns \\['context'\\].*choice_A"):
        longbench_prompts(words, 1, 0, None, str(other))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded.*longbench-v2:FOLDER"):
        longbench_prompts(words, 1, 0, None, str(tmp_path / "empty"))
