"""Chat: messages made uniform, templates found, bad rows named."""

import pytest

from eagle3_ds.data.chat import load_chat_template, validate_messages
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
        [{"role": "bot", "content": "x"}],
        "messages[0].role is 'bot', expected one of 'system', 'developer', 'user'",
    ),
    (
        [A],
        (
            "messages[0].role is 'assistant' first, where only 'system', 'developer', 'user' may stand: "
            "correct or remove"
        ),
    ),
    ([U, U], "messages[1].role is 'user' after 'user', where only 'assistant' may stand"),
    ([U, {"role": "assistant"}], "messages[1].content is missing or null, expected a string"),
    ([U, {"role": "assistant", "content": ["a"]}], "messages[1].content is a list, expected a string"),
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
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}],
    }
    assert messages[3] == {"role": "tool", "content": "42"}
    assert messages[5] == {"role": "assistant", "content": "a"} | dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "why"
    )
