"""The shapes of rows: recognised, read, and named when they are none or wrong."""

import pytest

from eagle3_ds.data.chat import Conversation
from eagle3_ds.data.shapes import TokenRow, read_row, recognise_shape
from tests.unit.data_samples import chat

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
    conversation = read_row(row, "sharegpt", "row")
    assert isinstance(conversation, Conversation)
    assert conversation.tools == [{"name": "f"}]
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    prompted = read_row(
        {"system": "s", "prompt": "q", "response": "a", "tools": []}, "prompt_response", "row"
    )
    assert prompted == Conversation(chat("q", "a", system="s"))


def test_an_unknown_shape_shows_the_keys():
    with pytest.raises(
        ValueError, match=r"^row: the row's shape is unknown, its keys are 'instruction', 'output'. Known are"
    ):
        recognise_shape({"output": "a", "instruction": "q", "input": None}, "row")
    with pytest.raises(
        ValueError, match=r"its keys are 'input_ids'. Known are .* or 'input_ids' and 'loss_mask': rename"
    ):
        recognise_shape({"input_ids": [1]}, "row")
    with pytest.raises(ValueError, match="^row: the row is a list, expected an object"):
        recognise_shape([1], "row")


BAD = [
    (
        {"text": "x"},
        "messages",
        "key 'messages' is missing (keys present: 'text'): rename the column, or set data.shape to one of",
    ),
    ({"prompt": "x"}, "prompt_response", "key 'response' is missing (keys present: 'prompt')"),
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


@pytest.mark.parametrize(("row", "shape", "message"), BAD)
def test_bad_rows_are_named(row, shape, message):
    with pytest.raises(ValueError) as caught:
        read_row(row, shape, "f.parquet, row 7")
    assert str(caught.value).startswith("f.parquet, row 7: ")
    assert message in str(caught.value)
