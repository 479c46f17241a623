"""Chat: the mask covers the assistant's words and nothing else; bad rows are named."""

import pytest
from data_samples import TEMPLATE, chat, tiny_tokenizer

from eagle3_ds.data.chat import encode_conversation, encode_conversations, read_chat_template, validate_row


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_mask_marks_the_assistant(tokenizer):
    messages = chat("one?", "uno é", "two?", "dos", system="be brief")
    input_ids, loss_mask = encode_conversation(tokenizer, messages)
    assert len(input_ids) == len(loss_mask)
    marked = tokenizer.decode([token for token, flag in zip(input_ids, loss_mask, strict=True) if flag])
    others = tokenizer.decode([token for token, flag in zip(input_ids, loss_mask, strict=True) if not flag])
    assert marked == "uno é<|end|>dos<|end|>"
    assert others == "<|system|>be brief<|end|><|user|>one?<|end|><|assistant|><|user|>two?<|end|><|assistant|>"


def test_a_batch_equals_its_members(tokenizer):
    rows = [chat("a", "b"), chat("the question of the fox", "answers", "more", "the end")]
    assert encode_conversations(tokenizer, rows) == [encode_conversation(tokenizer, row) for row in rows]


def test_templates_without_marks_are_refused(tokenizer):
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"\(data.chat_template\) has no {% generation %} marks.*put {% generation %}"):
        encode_conversation(tokenizer, chat("a", "b"), plain)
    with pytest.raises(ValueError, match="has no chat template: copy"):
        encode_conversation(tiny_tokenizer(chat_template=None), chat("a", "b"))
    with pytest.raises(ValueError, match=r"of the tokenizer .* has no {% generation %} marks"):
        encode_conversation(tiny_tokenizer(chat_template=plain), chat("a", "b"))


def test_a_template_that_marks_too_little_is_refused(tokenizer):
    last_only = TEMPLATE.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    with pytest.raises(ValueError, match="f.jsonl, row 3: .* marks 1 stretches of assistant tokens for 2 assistant"):
        encode_conversations(tokenizer, [chat("a", "b", "c", "d")], last_only, ["f.jsonl, row 3"])
    never = TEMPLATE.replace("== 'assistant'", "== 'nobody'")
    with pytest.raises(ValueError, match="marks 0 stretches"):
        encode_conversation(tokenizer, chat("a", "b"), never)


def test_read_chat_template(tmp_path):
    assert read_chat_template(None) is None
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert read_chat_template(str(tmp_path / "t.jinja")) == TEMPLATE
    with pytest.raises(ValueError, match="data.chat_template is 'no.jinja', which is not a file"):
        read_chat_template("no.jinja")


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = [
    ([], "the row is a list, expected an object"),
    ({"conversations": []}, "key 'messages' is missing (keys present: 'conversations')"),
    ({"messages": "hi"}, "'messages' is a str, expected a list"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": ["hi"]}, "messages[0] is a str, expected an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role is missing or null, expected a string"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role is 'bot', expected one of 'system', 'user'"),
    ({"messages": [A]}, "messages[0].role is 'assistant' first, where only 'system', 'user' may stand"),
    ({"messages": [U, U]}, "messages[1].role is 'user' after 'user', where only 'assistant' may stand"),
    ({"messages": [U, {"role": "assistant"}]}, "messages[1].content is missing or null, expected a string"),
    ({"messages": [U, {"role": "assistant", "content": ["a"]}]}, "messages[1].content is a list, expected a string"),
    ({"messages": [U, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
    ({"messages": [U]}, "no assistant message, so there is nothing to learn from"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError) as caught:
        validate_row(row, "f.jsonl, row 7")
    assert str(caught.value).startswith("f.jsonl, row 7: ")
    assert message in str(caught.value)


def test_good_rows():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "42", "name": None}
    messages = validate_row({"messages": [U, call, tool, tool, A, U, A]}, "row")
    assert "content" not in messages[1] and "name" not in messages[2]
