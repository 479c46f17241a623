"""The shapes of rows: recognised, read, and named when they are none or wrong."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from eagle3_ds.data.chat import Conversation
from eagle3_ds.data.shapes import Shape, TokenRow, read_row, recognise_shape
from tests.unit.data_samples import chat


def read_chat(row: Mapping[str, Any], shape: Shape) -> Conversation:
    """The row, which is one of messages."""
    read = read_row(row, shape, "row")
    assert isinstance(read, Conversation)
    return read


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
TOKENS = {"input_ids": [3, 1, 2], "loss_mask": [0, 1, 1]}
ROWS = [
    ({"messages": chat("q", "a"), "prompt": "q", "response": "a"}, "messages"),
    ({"conversations": chat("q", "a")}, "messages"),
    ({"messages": None, "conversations": chat("q", "a")}, "messages"),
    (SHAREGPT, "sharegpt"),
    ({"messages": SHAREGPT["conversations"]}, "sharegpt"),
    ({"prompt": "q", "response": "a", "id": 3}, "prompt_response"),
    ({"prompt": [{"role": "user", "content": "q"}], "response": "a"}, "prompt_response"),
]


@pytest.mark.parametrize(("row", "shape"), ROWS)
def test_every_shape_means_the_same_conversation(row, shape):
    assert recognise_shape(row, "row") == shape
    assert read_row(row, shape, "row") == Conversation(chat("q", "a"))


FURTHER = [
    ({"prompt": "q", "completion": "a"}, "prompt_response"),
    ({"prompt": chat("q"), "completion": chat("q", "a")[1:]}, "prompt_response"),
    ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "prompt_response"),
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
    ({"instruction": "q", "input": None, "output": "a"}, "alpaca"),
    ({"instruction": "q", "response": "a"}, "alpaca"),
]


@pytest.mark.parametrize(("row", "shape"), FURTHER)
def test_other_names_of_question_and_answer(row, shape):
    assert recognise_shape(row, "row") == shape
    assert read_row(row, shape, "row") == Conversation(chat("q", "a"))


def test_alpaca_with_input_history_and_system():
    row = {
        "instruction": "Sort.",
        "input": "b a",
        "output": "a b",
        "history": [["Hi", "Hello"]],
        "system": "s",
        "text": "all of it",
    }
    read = read_row(row, "alpaca", "row")
    assert read == Conversation(chat("Hi", "Hello", "Sort.\n\nb a", "a b", system="s"))
    assert read.notes == ("rows have columns that are not read: 'text'",)


@pytest.mark.parametrize(
    "row",
    [
        {"system": "s", "messages": chat("q", "a")},
        {"system_prompt": "s", "messages": chat("q", "a")},
        {"system": "s", "messages": chat("q", "a", system="s")},
        {"system": "other", "messages": chat("q", "a", system="s")},
        {"system": "s", **SHAREGPT},
        {"system": "s", "conversations": [{"from": "system", "value": "s"}, *SHAREGPT["conversations"]]},
        {"system": "", "messages": chat("q", "a", system="s")},
    ],
)
def test_a_system_column_stands_before_messages_of_every_shape(row):
    read = read_row(row, recognise_shape(row, "row"), "row")
    assert read == Conversation(chat("q", "a", system="s"))
    assert ("system column beside another" in "".join(read.notes)) == (row.get("system") == "other")


@pytest.mark.parametrize("given", [{"enable_thinking": False}, '{"enable_thinking": false}', None, {}, ""])
def test_what_a_row_gives_to_its_template(given):
    read = read_chat({"messages": chat("q", "a"), "chat_template_kwargs": given}, "messages")
    assert read.arguments == ({"enable_thinking": False} if given else {})
    assert not read.notes


def test_columns_and_marks_that_are_not_read_are_told():
    weighted = [*chat("q"), {"role": "assistant", "content": "a", "weight": 0}, *chat("q", "a")]
    read = read_row(
        {"messages": weighted, "id": 3, "parallel_tool_calls": True, "x": None}, "messages", "row"
    )
    assert read.notes[0] == "rows have columns that are not read: 'id', 'parallel_tool_calls'"
    assert "'weight' says not to learn" in read.notes[1] and len(read.notes) == 2
    turns = [
        *SHAREGPT["conversations"],
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "loss": False},
    ]
    assert [m.get("weight") for m in read_chat({"conversations": turns}, "sharegpt").messages] == [
        None, None, None, 0,
    ]  # fmt: skip


TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"default": None}}}}


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [TOOL]},
        {"tools": [{"type": "function", "function": TOOL}]},
        {"tools": [{"type": "function", **TOOL}]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL]},
    ],
)
def test_tools_take_the_form_that_servers_give_to_templates(given):
    read = read_chat({"messages": chat("q", "a"), **given}, "messages")
    assert read.tools == [{"type": "function", "function": TOOL}]


PADDED = [
    {"input_ids": [9, 9, 3, 1, 2], "loss_mask": [0, 0, 0, 1, 1], "attention_mask": [0, 0, 1, 1, 1]},
    {"input_ids": [3, 1, 2, 9], "loss_mask": [0, 1, 1, 0], "attention_mask": [1, 1, 1, 0]},
    {"input_ids": [9, 3, 1, 2, 9], "assistant_masks": [0, 0, 1, 1, 0], "attention_mask": [0, 1, 1, 1, 0]},
    {"input_ids": [9, 3, 1, 2], "labels": [-100, -100, 1, 2], "attention_mask": [False, True, True, True]},
]


@pytest.mark.parametrize("row", PADDED)
def test_padding_is_no_context(row):
    read = read_row(row, recognise_shape(row, "row"), "row")
    assert read == TokenRow([3, 1, 2], [False, True, True])
    assert read.notes == ("rows have padding by 'attention_mask', which was cut off",)


def test_an_attention_mask_of_ones_cuts_nothing():
    read = read_row(TOKENS | {"attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 0]}, "tokenized", "row")
    assert read == TokenRow([3, 1, 2], [False, True, True])
    assert read.notes == ("rows have columns that are not read: 'token_type_ids'",)


def test_rows_of_tokens():
    assert recognise_shape(TOKENS, "row") == "tokenized"
    assert read_row(TOKENS, "tokenized", "row") == TokenRow([3, 1, 2], [False, True, True])
    assert recognise_shape(TOKENS | {"messages": chat("q", "a")}, "row") == "tokenized"


def test_systems_tools_and_calls():
    row = {
        "system": "be kind",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "a"},
        ],
    }
    conversation = read_chat(row, "sharegpt")
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert conversation.messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    prompted = read_row(
        {"system": "s", "prompt": "q", "response": "a", "tools": []}, "prompt_response", "row"
    )
    assert prompted == Conversation(chat("q", "a", system="s"))


def test_an_unknown_shape_shows_the_keys():
    with pytest.raises(
        ValueError, match=r"^row: the row's shape is unknown, its keys are 'answer', 'instruction'. Known are"
    ):
        recognise_shape({"answer": "a", "instruction": "q", "input": None}, "row")
    with pytest.raises(
        ValueError,
        match=r"its keys are 'input_ids'. Known are .* or 'input_ids' and 'loss_mask' or 'labels': rename",
    ):
        recognise_shape({"input_ids": [1]}, "row")
    with pytest.raises(ValueError, match="^row: the row is a list, expected an object"):
        recognise_shape([1], "row")


BAD = [
    (
        {"text": "x"},
        "messages",
        (
            "key 'messages' or 'conversations' is missing (keys present: 'text'): rename the column, or set "
            "data.shape to one of"
        ),
    ),
    (
        {"prompt": "x"},
        "prompt_response",
        "key 'response' or 'completion' is missing (keys present: 'prompt')",
    ),
    ({"prompt": "q", "response": ""}, "prompt_response", "response is empty"),
    ({"prompt": 3, "response": "a"}, "prompt_response", "prompt is a int, expected a string"),
    ({"messages": "x"}, "messages", "'messages' is a str, expected a list of messages"),
    ({"conversations": "x"}, "sharegpt", "'conversations' is a str, expected a list of from / value"),
    (
        {"conversations": ["x"]},
        "sharegpt",
        "conversations[0] is a str, expected an object with 'from' and 'value'",
    ),
    (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "sharegpt",
        "conversations[0].from is 'narrator', expected one of",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "f"}]},
        "sharegpt",
        "conversations[0].value is not valid JSON",
    ),
    (
        {"messages": chat("q", "a"), "tools": {"name": "f"}},
        "messages",
        "'tools' is a dict, expected a list of JSON schemas",
    ),
    (
        {"input_ids": [1, 2], "loss_mask": [1]},
        "tokenized",
        "'input_ids' has 2 entries and 'loss_mask' 1: they must match",
    ),
    ({"input_ids": "12", "loss_mask": [1, 0]}, "tokenized", "'input_ids' is not a list of integers"),
    ({"input_ids": [True, False], "loss_mask": [1, 0]}, "tokenized", "'input_ids' is not a list of integers"),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "tokenized", "'loss_mask' holds 2, expected 0 and 1"),
    (
        {"input_ids": [1, 2], "loss_mask": [0, 0]},
        "tokenized",
        "'loss_mask' marks no token, so there is nothing to learn from",
    ),
    (
        {"input_ids": [1, -100], "loss_mask": [1, 0]},
        "tokenized",
        "'input_ids' holds -100: token ids are not negative",
    ),
]


BAD += [
    (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
        "sharegpt",
        "conversations[1].value is empty",
    ),
    ({"conversations": chat("q", "")}, "messages", "conversations[1].content is empty"),
    (SHAREGPT, "messages", "the row is of shape 'sharegpt' (keys 'conversations'), but the file is read as"),
    ({"messages": chat("q", "a")}, "sharegpt", "the row is of shape 'messages' (keys 'messages'), but"),
    (
        {"prompt": "q", "completion": "a"},
        "messages",
        "the row is of shape 'prompt_response' (keys 'completion'",
    ),
    (
        TOKENS,
        "alpaca",
        "the row is of shape 'tokenized' (keys 'input_ids', 'loss_mask'), but the file is read",
    ),
    (
        {"instruction": "q", "output": "a"},
        "tokenized",
        "the row is of shape 'alpaca' (keys 'instruction', 'output')",
    ),
    ({"text": "x"}, "tokenized", "key 'input_ids' is missing (keys present: 'text')"),
    ({"instruction": "q", "output": ""}, "alpaca", "output is empty"),
    (
        {"instruction": "q", "output": "a", "history": [["x"]]},
        "alpaca",
        "'history' is a list, expected a list of",
    ),
    (
        {"messages": chat("q", "a"), "chat_template_kwargs": {"add_generation_prompt": True}},
        "messages",
        "'chat_template_kwargs' sets 'add_generation_prompt', which no row may set",
    ),
    ({"messages": chat("q", "a"), "chat_template_kwargs": 3}, "messages", "'chat_template_kwargs' is a int"),
    (TOKENS | {"attention_mask": [1, 1]}, "tokenized", "'input_ids' has 3 entries and 'attention_mask' 2"),
    (TOKENS | {"attention_mask": [1, 2, 2]}, "tokenized", "'attention_mask' holds 2, expected 0 and 1"),
    (TOKENS | {"attention_mask": [1, 0, 1]}, "tokenized", "'attention_mask' hides tokens between others"),
    (
        TOKENS | {"attention_mask": [1, 1, 0]},
        "tokenized",
        "tokens are to be learnt that 'attention_mask' hides",
    ),
    (TOKENS | {"attention_mask": [0, 0, 0]}, "tokenized", "'attention_mask' shows no token"),
    (
        {"input_ids": [1, 2], "labels": [2, -100]},
        "tokenized",
        "labels[0] is 2, expected -100 or input_ids[0]",
    ),
    ({"input_ids": [1, 2], "labels": [-100, -100]}, "tokenized", "'labels' marks no token"),
]


@pytest.mark.parametrize(("row", "shape", "message"), BAD)
def test_bad_rows_are_named(row, shape, message):
    with pytest.raises(ValueError) as caught:
        read_row(row, shape, "f.parquet, row 7")
    assert str(caught.value).startswith("f.parquet, row 7: ")
    assert message in str(caught.value)
