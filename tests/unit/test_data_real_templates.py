"""Published templates and vocabularies: what is learnt of a row, and what the statistics say is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eagle3_ds.data.prepare import prepare_data
from tests.unit.data_samples import data_recipe
from tests.unit.real_tokenizers import real_tokenizer
from tests.unit.test_data_families import (
    CHATML,
    INLINE,
    PROMPT,
    REASONED,
    TAGGED,
    TWO_TURNS,
    assistant,
    call,
    count_renders,
    tool,
    user,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}},
    },
}
EOT, IM, EOS = "<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>"


def prepare(
    tmp_path: Any, tokenizer: Any, messages: Any, tools: Any = None, **settings: Any
) -> tuple[list[str], str]:
    """The supervised stretches of the row, and what the statistics say."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    recipe = data_recipe(tmp_path, train=(str(path),), heldout_fraction=0.0, max_length=4096, **settings)
    data = prepare_data(recipe, tokenizer, tokenizer.chat_template, show_progress=False)
    ids, mask = data.train[0]["input_ids"], data.train[0]["loss_mask"]
    found, done = [], ""
    for place, flag in enumerate(mask):
        if place + 1 == len(mask) or mask[place + 1] != flag:
            text = tokenizer.decode(ids[: place + 1], clean_up_tokenization_spaces=False)
            found += [text[len(done) :]] if flag else []
            done = text
    return found, "\n".join(data.statistics.lines())


# A generation prompt that is always there, and an end of text that ends no turn

ALWAYS = {
    "chatml": (CHATML + "{{ '<|im_start|>assistant\\n' }}", "<|endoftext|>", IM),
    "chatml, a system message by itself": (
        "{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}" + CHATML + "{{ '<|im_start|>assistant\\n' }}",
        "<|endoftext|>", IM,
    ),
    "chatml, asked for": (CHATML + PROMPT, "<|endoftext|>", IM),
    "chatml, one line": (
        CHATML.replace("<|im_end|>\\n", IM) + "{{ '<|im_start|>assistant\\n' }}", "<|endoftext|>", IM,
    ),
}  # fmt: skip


def test_llama3s_first_template_learns_no_header(tmp_path):
    supervised, told = prepare(tmp_path, real_tokenizer("llama3"), TWO_TURNS)
    assert supervised == ["Hello! I am here." + EOT, "It is 42." + EOT]
    assert "left out" not in told and "leaves out" not in told


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("length", [2, 4])
def test_no_header_is_learnt(tmp_path, name, length):
    template, eos, end = ALWAYS[name]
    tokenizer = real_tokenizer("qwen3")
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    supervised, _ = prepare(tmp_path, tokenizer, TWO_TURNS[:length])
    assert supervised == [message["content"] + end for message in TWO_TURNS[1:length:2]]


# Reasoning


@pytest.mark.parametrize(
    ("family", "messages", "count"),
    [
        ("deepseek-r1", INLINE, 2),
        ("deepseek-r1", REASONED, 2),
        ("qwen3", INLINE, 1),
        ("qwen3", REASONED, 1),
        ("nemotron-nano", INLINE, 1),
        ("gpt-oss", REASONED, 1),
        ("llama3.1", REASONED, 2),
        ("deepseek-v3", INLINE, 0),
    ],
)
def test_reasoning_that_a_template_drops_is_counted(tmp_path, family, messages, count):
    supervised, told = prepare(tmp_path, real_tokenizer(family), messages)
    said = f"{count} assistant messages have reasoning that the chat template leaves out" in told
    assert said == bool(count) and sum("Hm." in text for text in supervised) == (not count)


def test_results_of_tools_within_a_users_words(tmp_path):
    messages = TAGGED["results of tools as a user's words"]
    supervised, told = prepare(tmp_path, real_tokenizer("qwen3"), messages)
    assert "Ask." in supervised[0] and "Tell." in supervised[1] and "leaves out" not in told


@pytest.mark.parametrize(
    ("family", "messages", "met"),
    [
        ("deepseek-r1", TWO_TURNS, False),
        ("nemotron-nano", TWO_TURNS, False),
        ("nemotron-nano", REASONED, True),
        ("qwen3", TWO_TURNS, True),
        ("qwen3.5-thinking", REASONED, True),
        ("llama3", TWO_TURNS, True),
    ],
)
def test_a_last_turn_without_the_servers_prompt_is_counted(tmp_path, family, messages, met):
    _, told = prepare(tmp_path, real_tokenizer(family), messages)
    assert ("1 conversations end with a turn that lacks what the server's prompt opens it with" in told) == (
        not met
    )


@pytest.mark.parametrize(
    ("family", "between"),
    [("nemotron-nano", "\n</think>\n"), ("nemotron-super", "\n</think>\n"), ("nemotron-ultra", "</think>")],
)
def test_a_thinking_prompt_and_a_history_without(tmp_path, family, between):
    supervised, told = prepare(tmp_path, real_tokenizer(family), REASONED)
    assert supervised == ["Hello!" + IM, f"Let me see.\nYes.{between}It is 42." + IM]
    assert "1 assistant messages have reasoning" in told


# Calls

PARALLEL = [
    user("Weather in Paris and Rome?"),
    assistant("Let me look.", tool_calls=[call(city="Paris"), call(city="Rome", number="abcdefghj")]),
    tool("21"),
    tool("25"),
    assistant("21 and 25."),
]


@pytest.mark.parametrize(
    ("family", "calls", "words"),
    [("deepseek-v3", 2, 0), ("deepseek-r1", 2, 0), ("gpt-oss", 1, 1), ("qwen3", 0, 0), ("qwen2.5", 0, 0)],
)
def test_calls_that_a_template_drops_are_counted(tmp_path, family, calls, words):
    _, told = prepare(tmp_path, real_tokenizer(family), PARALLEL, [WEATHER])
    assert (f"{calls} tool calls of the assistant are left out" in told) == bool(calls)
    assert (f"{words} assistant messages have words beside" in told) == bool(words)


@pytest.mark.parametrize(
    ("family", "arguments", "expected"),
    [
        ("gpt-oss", {}, " to=functions.weather<|channel|>commentary json<|message|>{}<|call|>"),
        ("gpt-oss", {"a": True},
         ' to=functions.weather<|channel|>commentary json<|message|>{"a": true}<|call|>'),
        ("gpt-oss", {"a": [1, 2.5]},
         ' to=functions.weather<|channel|>commentary json<|message|>{"a": [1, 2.5]}<|call|>'),
        ("qwen3", {}, '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>' + IM),
        ("qwen3", {"a": {"b": None, "c": "é\n"}},
         '<tool_call>\n{"name": "weather", "arguments": {"a": {"b": null, "c": "é\\n"}}}\n</tool_call>' + IM),
        ("llama3.1", {"a": 3}, '{"name": "weather", "parameters": {"a": 3}}' + EOT),
        ("nemotron-nano", {"a": 3, "b": "x"},
         "<tool_call>\n<function=weather>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
         "</function>\n</tool_call>\n" + IM),
    ],
)  # fmt: skip
def test_calls_keep_the_types_of_their_arguments(tmp_path, family, arguments, expected):
    made = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [user("Weather?"), assistant("", tool_calls=[made]), tool("21"), assistant("21.")]
    supervised, told = prepare(tmp_path, real_tokenizer(family), messages, [WEATHER])
    assert supervised[0] == expected
    assert "left out" not in told


DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>"


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-r1"])
@pytest.mark.parametrize("arguments", [{"city": 'Pa"ris é', "days": 3}, {"a": [{"b": None}, 1.5, True]}, {}])
def test_calls_whose_arguments_a_template_wants_as_text(tmp_path, family, arguments):
    said = DEEPSEEK.replace("{}", json.dumps(arguments, ensure_ascii=False))
    function = {"name": "weather", "arguments": arguments}
    made = {"id": "abcdefghi", "type": "function", "function": function}
    one = [user("Weather?"), assistant("", tool_calls=[made]), tool("21"), assistant("21.")]
    supervised, told = prepare(tmp_path, real_tokenizer(family), one)
    assert supervised == ["<｜tool▁calls▁begin｜>" + said, "21." + EOS]
    assert "1 turns of tool calls have no end token" in told and "left out" not in told
    two = [user("Weather?"), assistant("", tool_calls=[made] * 2), tool("21"), tool("22"), assistant("21.")]
    supervised, told = prepare(tmp_path, real_tokenizer(family), two)
    assert supervised[0] == f"<｜tool▁calls▁begin｜>{said}\n{said}<｜tool▁calls▁end｜>{EOS}"
    assert "no end token" not in told and "left out" not in told


def test_a_log_of_calls_without_an_end_takes_a_handful_of_renders(tmp_path, monkeypatch):
    rendered = count_renders(monkeypatch)
    log = [user("Weather?")]
    for number in range(40):
        log += [assistant("", tool_calls=[call(city=f"c{number}")]), tool(f"It is {number}."), user("Go on.")]
    tokenizer = real_tokenizer("deepseek-v3")
    # The published template opens the first message of calls alone.
    opened = "message['content'] is none %}{%- set ns.is_tool = false -%}"
    again = opened + "{%- set ns.is_first = false -%}"
    with pytest.raises(ValueError, match="the generation prompt is not how the template renders"):
        prepare(tmp_path, tokenizer, log[:-1])
    tokenizer.chat_template = tokenizer.chat_template.replace(opened, again)
    rendered.clear()
    supervised, told = prepare(tmp_path, tokenizer, log[:-1])
    assert len(supervised) == 40 and "40 turns of tool calls have no end token" in told
    assert all(text.endswith("```<｜tool▁call▁end｜>") for text in supervised) and len(rendered) <= 16


# Ends

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}MORE{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "REST{% endfor %}" + PROMPT
)


@pytest.mark.parametrize(
    ("more", "rest", "count"),
    [
        ("", "<|im_end|>\n", 2),
        ("\n", "<|im_end|>", 2),
        ("", "", 2),
        ("<|im_end|>", "\n", 0),
        ("<|im_end|>\n", "", 0),
    ],
)
def test_marks_that_leave_out_the_end_are_counted(tmp_path, more, rest, count):
    tokenizer = real_tokenizer("qwen3")
    tokenizer.chat_template = MARKED.replace("MORE", more).replace("REST", rest)
    _, told = prepare(tmp_path, tokenizer, TWO_TURNS)
    assert (f"{count} turns have their end token outside of the chat template's" in told) == bool(count)


SAYS_END = {
    "in an argument": ("qwen3", assistant("", tool_calls=[call(city="a<|im_end|>b")]), "tool_calls"),
    "deep in an argument": ("qwen3", assistant("", tool_calls=[call(a={"b": ["<|im_end|>"]})]), "tool_calls"),
    "in an argument's name": (
        "qwen3",
        assistant("", tool_calls=[call("weather", "abcdefghi", **{"<|im_end|>": 1})]),
        "tool_calls",
    ),
    "in words": ("qwen3", assistant("a <|im_end|> b"), "content"),
    "in reasoning": ("qwen3", assistant("a", reasoning="b <|im_end|>"), "reasoning_content"),
    "of llama": ("llama3", assistant("a <|eot_id|> b"), "content"),
    "another end than the turn's": ("llama3", assistant("a <|end_of_text|> b"), "content"),
    "another end of gpt-oss": ("gpt-oss", assistant("a <|return|> b"), "content"),
}


@pytest.mark.parametrize("name", SAYS_END)
def test_ends_that_the_assistant_says_are_refused(tmp_path, name):
    family, message, key = SAYS_END[name]
    messages = [user("Hi"), message, *([tool("1"), assistant("x")] if "tool_calls" in message else [])]
    with pytest.raises(
        ValueError, match=rf"rows.jsonl, line 1: messages\[1\].{key} holds '<\|.*\|>', the token"
    ):
        prepare(tmp_path, real_tokenizer(family), messages, [WEATHER])


# Many turns


@pytest.mark.parametrize("family", ["qwen3", "llama3", "nemotron-nano", "deepseek-r1", "gpt-oss"])
def test_a_conversation_takes_a_handful_of_renders(tmp_path, family, monkeypatch):
    rendered = count_renders(monkeypatch)
    messages = [message for n in range(40) for message in (user(f"Is it {n}?"), assistant(f"No, {n + 1}."))]
    supervised, _ = prepare(tmp_path, real_tokenizer(family), messages)
    assert len(supervised) == 40 and len(rendered) <= 16
