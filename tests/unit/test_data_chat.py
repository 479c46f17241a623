"""Chat: messages made uniform, templates found, bad rows named."""

import json
from typing import Any

import pytest

from eagle3_ds.data.chat import is_learnt, load_chat_template, notes_on, validate_messages
from tests.unit.data_samples import TEMPLATE, chat, tiny_tokenizer


def test_templates_are_found(tmp_path):
    tokenizer = tiny_tokenizer()
    assert load_chat_template(tokenizer).text == TEMPLATE
    (tmp_path / "t.jinja").write_text("other")
    other = load_chat_template(tokenizer, str(tmp_path / "t.jinja"), {"a": 1})
    assert other.text == other.tool_text == "other" and other.arguments == {"a": 1}
    assert other.special.fullmatch("<|end|>") and not other.special.search("<|en")
    with pytest.raises(ValueError, match="data.chat_template is 'no.jinja', which is not a file"):
        load_chat_template(tokenizer, "no.jinja")
    with pytest.raises(ValueError, match=r"has no chat template: .* name the file in data.chat_template"):
        load_chat_template(tiny_tokenizer(chat_template=None))


def test_a_tokenizer_with_a_template_for_tools():
    template = load_chat_template(
        tiny_tokenizer({"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools[0].name }}"})
    )
    assert template.render(chat("a", "b"), None, "row") == "plain a"
    assert template.render(chat("a", "b"), [{"name": "f"}], "row") == "f"


def test_arguments_reach_the_template():
    template = load_chat_template(tiny_tokenizer("{{ eos_token }}{{ style }}"), arguments={"style": "terse"})
    assert template.render(chat("a", "b"), None, "row") == "<|end|>terse"


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
BAD = [
    ("hi", "'messages' is a str, expected a list"),
    ([], "'messages' is empty"),
    (["hi"], "messages[0] is a str, expected an object"),
    ([{"content": "x"}], "messages[0].role is missing or null, expected a string"),
    (
        [{"role": "narrator", "content": "x"}],
        "messages[0].role is 'narrator', expected one of 'system', 'developer', 'user'",
    ),
    ([A], "no assistant message after the first, so there is nothing to learn from: remove the row"),
    ([U, U], "no assistant message, so there is nothing to learn from: remove the row"),
    ([U, {"role": "assistant"}], "messages[1].content is missing or null, expected a string"),
    ([U, {"role": "assistant", "content": [3]}], "messages[1].content[0] is a int, expected an object"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A],
        "messages[0].content[0] is a part of type 'image_url', expected type 'text'",
    ),
    ([U, {"role": "assistant", "content": []}], "messages[1].content is empty"),
    ([U, A | {"weight": "low"}], "messages[1].weight is 'low', expected 0 or 1, false or true"),
    ([U, A | {"train": False}], "every assistant message is marked not to be learnt ('weight', 'train'"),
    ([U, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
    ([{"role": "user", "content": b"\x00\xff"}, A], "messages[0].content is a bytes, expected a string"),
    (
        [{"role": "user", "content": "ab\x00c"}, A],
        "messages[0].content is binary data, not text (U+0000 at character 2)",
    ),
    (
        [{"role": "user", "content": "\ud800"}, A],
        "messages[0].content is binary data, not text (U+D800 at character 0)",
    ),
    ([U], "no assistant message, so there is nothing to learn from: remove the row"),
    ([U, A | {"reasoning": "a", "thinking": "b"}], "messages[1] has different reasoning under several of"),
    ([U, A | {"reasoning": 3}], "messages[1].reasoning is a int, expected a string"),
    ([U, A | {"tool_calls": {"name": "f"}}], "messages[1].tool_calls is a dict, expected a list of calls"),
    ([U, A | {"tool_calls": ["f"]}], "messages[1].tool_calls[0] is a str, expected an object"),
    ([U, A | {"tool_calls": [{"arguments": {}}]}], "messages[1].tool_calls[0].name is missing or null"),
    (
        [U, A | {"tool_calls": [{"function": CALL | {"arguments": "{"}}]}],
        "tool_calls[0].function.arguments is not valid JSON",
    ),
    (
        [U, A | {"tool_calls": [CALL | {"arguments": [1]}]}],
        "tool_calls[0].arguments is a list, expected an object",
    ),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ValueError) as caught:
        validate_messages(messages, "f.jsonl, line 7")
    assert str(caught.value).startswith("f.jsonl, line 7: ")
    assert message in str(caught.value)


def test_messages_are_made_uniform():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": None, "function": CALL | {"arguments": '{"x": null}'}}],
    }
    tool = {"role": "tool", "content": "42", "name": None}
    spoken = {"role": "assistant", "content": "a", "reasoning": "why", "thinking": "", "tool_calls": []}
    messages = validate_messages(
        [{"role": "developer", "content": "d"}, U, call, tool, tool, spoken, U, A], "row"
    )
    assert messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}],
    }
    assert messages[3] == {"role": "tool", "content": "42"}
    assert messages[5] == {"role": "assistant", "content": "a"} | dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "why"
    )


CALL_ONLY = {"name": "f", "arguments": {"x": 1}}
UNIFORM_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL_ONLY}],
}
CALLS = {
    "flat": {"role": "assistant", "tool_calls": [CALL_ONLY]},
    "flat with type": {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function"} | CALL_ONLY],
    },
    "openai": {"role": "assistant", "content": None, "tool_calls": [{"function": CALL_ONLY, "index": None}]},
    "no content": {"role": "assistant", "content": [], "tool_calls": [{"function": CALL_ONLY}]},
    "arguments in text": {"role": "gpt", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
    "parameters": {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
    "all in text": {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
    "older openai": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"x": 1}'},
    },
    "said": {"role": "function_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
    "said as a list": {"role": "tool_call", "content": [CALL_ONLY]},
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_take_the_form_that_servers_give_to_templates(form):
    given = json.loads(json.dumps(CALLS[form]))
    assert validate_messages([U, given, {"role": "function", "name": "f", "content": ""}, A], "row")[1:] == [
        UNIFORM_CALL,
        {"role": "tool", "name": "f", "content": ""},
        A,
    ]
    assert given == CALLS[form], "the row itself is left alone"


def test_calls_keep_their_ids_and_the_words_beside_them():
    call = {"id": "c1", "name": "f", "arguments": {}}
    (_, message) = validate_messages([U, A | {"tool_calls": [call]}], "row")
    assert message == A | {
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    }


def test_parts_of_text_become_one_text():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}]
    thought = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]
    system = {"role": "system", "content": [{"type": "text", "text": ""}]}
    messages = validate_messages(
        [system, {"role": "user", "content": parts}, {"role": "assistant", "content": thought}], "row"
    )
    assert [message["content"] for message in messages] == ["", "a\nb\nc", "a"]
    assert messages[2]["reasoning_content"] == messages[2]["thinking"] == "why"


@pytest.mark.parametrize("speaker", ["assistant", "gpt", "GPT", "model", "bot", "ai", "chatgpt"])
def test_speakers_have_other_names(speaker):
    human, tool = {"role": "human", "content": "q"}, {"role": "ipython", "content": "r"}
    messages = validate_messages([human, {"role": speaker, "content": "a"}, tool, A], "row")
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}, {"trainable": False}],
)
def test_messages_that_are_context_alone(mark):
    learnt = {"weight": 1, "train": True, "loss": None}
    messages = validate_messages([U, A | mark, U, A | learnt, A | learnt | mark], "row")
    assert messages == [U, A | {"weight": 0}, U, A, A | {"weight": 0}]
    (note, *_) = notes_on([U, A | mark], messages[:2])
    assert repr(next(iter(mark))) in note and "not to learn" in note


ORDERS = [
    ([A, U, A], "'assistant' first (context, not learnt)"),
    ([U, U, A], "'user' after 'user'"),
    ([U, A, A], "'assistant' after 'assistant'"),
    ([U, {"role": "system", "content": "s"}, A], "'system' after 'user'"),
    ([{"role": "system", "content": "s"}, A], "'assistant' after 'system'"),
]


@pytest.mark.parametrize(("messages", "told"), ORDERS)
def test_the_order_of_roles_is_the_templates_affair_and_told(messages, told):
    uniform = validate_messages(messages, "row")
    assert any(told in note for note in notes_on(messages, uniform))
    assert [is_learnt(message) for message in uniform] == [
        (index, message["role"]) != (0, "assistant") for index, message in enumerate(messages)
    ]
    assert not list(notes_on([U, A, U, A], [U, A, U, A]))


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("content", ["", None, []])
def test_messages_that_may_be_empty(role, content):
    given: list[dict[str, Any]] = [U, {"role": role, "content": content}, A]
    messages = validate_messages(given, "row")
    assert messages[1] == {"role": role, "content": ""}
    assert f"conversations have an empty {role} message" in notes_on(given, messages)


def test_other_weights_and_marks_are_told():
    assert validate_messages([U | {"train": False}, A], "row") == [U, A]
    given: list[dict[str, Any]] = [U | {"train": True}, A | {"weight": 0.5}]
    told = list(notes_on(given, validate_messages(given, "row")))
    assert told == [
        "conversations mark 'user' messages by 'train': only the assistant's are learnt",
        "conversations have a 'weight' other than 0 and 1: learnt like the others",
    ]
