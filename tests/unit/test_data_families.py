"""The assistant mask under the templates of seven families, against what a server would generate, written out
by hand.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tokenise import agent_log
from eagle3_ds.data import chat, token_mask
from eagle3_ds.data.chat import Conversation, load_chat_template, validate_messages
from eagle3_ds.data.disguise import find_words
from eagle3_ds.data.token_mask import MaskedTokens, mask_tokens
from eagle3_ds.data.turns import Turns, locate_turns
from tests.unit.chat_families import family_tokenizer, template

Messages = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "weather", number: str = "abcdefghi", **arguments: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abcdefghi"}


def chatml(text: str) -> Any:
    return family_tokenizer("qwen2.5", text)


def masked(
    tokenizer: Any, messages: Messages, tools: Any = None, supervise: Any = "all", **arguments: Any
) -> MaskedTokens:
    turns = locate(tokenizer, messages, tools, supervise, **arguments)
    return mask_tokens(tokenizer, [turns.text], [turns.spans], ["row"])[0]


def locate(
    tokenizer: Any, messages: Messages, tools: Any = None, supervise: Any = "all", **arguments: Any
) -> Turns:
    chat_template = load_chat_template(tokenizer, None, arguments)
    conversation = Conversation(validate_messages(messages, "row"), tools)
    return locate_turns(chat_template, conversation, supervise, "row")


def stretches(tokenizer: Any, tokens: MaskedTokens) -> list[str]:
    """Text of each stretch of supervised tokens, as it stands in its place."""
    found, done = [], ""
    for place, flag in enumerate(tokens.loss_mask):
        last = place + 1 == len(tokens.loss_mask) or tokens.loss_mask[place + 1] != flag
        if last:
            text = tokenizer.decode(tokens.input_ids[: place + 1])
            found += [text[len(done) :]] if flag else []
            done = text
    return found


TWO_TURNS = [user("Hi there"), assistant("Hello! I am here."), user("Is it 42?"), assistant("It is 42.")]
REASONED = [
    user("Hi there"),
    assistant("Hello!", reasoning_content="The user greets."),
    user("Is it 42?"),
    assistant("It is 42.", reasoning_content="Let me see.\nYes."),
]
INLINE = [
    user("Hi there"),
    assistant("<think>\nHm.\n</think>\n\nHello!"),
    user("42?"),
    assistant("<think>\nOh.\n</think>\n\nYes."),
]
CALLS = [
    user("Weather in Paris?"),
    assistant(tool_calls=[call(city="Paris", days=3)]),
    tool("sunny"),
    assistant("It is sunny."),
    user("Thanks"),
    assistant("Welcome."),
]
REASONED_CALLS = [
    user("Weather in Paris?"),
    assistant(tool_calls=[call(city="Paris")], reasoning_content="Ask the tool."),
    tool("sunny"),
    assistant("It is sunny.", reasoning_content="Tell them."),
    user("Thanks"),
    assistant("Welcome.", reasoning_content="Be kind."),
]
QWEN_CALL = (
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call><|im_end|>'
)

CASES: dict[str, tuple[str, Messages, Any, dict[str, Any], list[str]]] = {
    "llama3": (
        "llama3", [SYSTEM, *TWO_TURNS], None, {}, ["Hello! I am here.<|eot_id|>", "It is 42.<|eot_id|>"],
    ),
    "llama3, no system, trimmed": (
        "llama3", [user("  Hi \n"), assistant("\n\n  Hello! \n")], None, {"date_string": "1 Jan 2025"},
        ["Hello!<|eot_id|>"],
    ),
    "llama3, tools": (
        "llama3", CALLS, [WEATHER], {},
        ['{"name": "weather", "parameters": {"city": "Paris", "days": 3}}<|eot_id|>',
         "It is sunny.<|eot_id|>", "Welcome.<|eot_id|>"],
    ),
    "llama3, a built-in tool ends otherwise": (
        "llama3",
        [user("Find it"), assistant(tool_calls=[call("brave_search", query="it")]), tool("found"),
         assistant("Here.")],
        None, {}, ['<|python_tag|>brave_search.call(query="it")<|eom_id|>', "Here.<|eot_id|>"],
    ),
    "qwen2.5, default system": (
        "qwen2.5", TWO_TURNS, None, {}, ["Hello! I am here.<|im_end|>", "It is 42.<|im_end|>"],
    ),
    "qwen2.5, tools": (
        "qwen2.5", [SYSTEM, *CALLS], [WEATHER], {},
        [QWEN_CALL[1:], "It is sunny.<|im_end|>", "Welcome.<|im_end|>"],
    ),
    "qwen2.5, words and a call": (
        "qwen2.5", [user("Weather?"), assistant("Let me see.", tool_calls=[call(city="Paris", days=3)])],
        [WEATHER], {}, ["Let me see." + QWEN_CALL],
    ),
    "qwen2.5, a call without arguments": (
        "qwen2.5", [user("Now?"), assistant(tool_calls=[call("now")]), tool("9"), assistant("9")], None, {},
        ['<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>', "9<|im_end|>"],
    ),
    "qwen3, thinking: earlier reasoning is dropped": (
        "qwen3", REASONED, None, {},
        ["Hello!<|im_end|>", "<think>\nLet me see.\nYes.\n</think>\n\nIt is 42.<|im_end|>"],
    ),
    "qwen3, reasoning within the content": (
        "qwen3", INLINE, None, {}, ["Hello!<|im_end|>", "<think>\nOh.\n</think>\n\nYes.<|im_end|>"],
    ),
    "qwen3, thinking asked but not done": (
        "qwen3", TWO_TURNS, None, {},
        ["Hello! I am here.<|im_end|>", "<think>\n\n</think>\n\nIt is 42.<|im_end|>"],
    ),
    "qwen3, not thinking: the prompt holds more than earlier turns": (
        "qwen3", TWO_TURNS, None, {"enable_thinking": False},
        ["Hello! I am here.<|im_end|>", "It is 42.<|im_end|>"],
    ),
    "qwen3, not thinking, tools": (
        "qwen3", CALLS, [WEATHER], {"enable_thinking": False},
        [QWEN_CALL[1:], "It is sunny.<|im_end|>", "Welcome.<|im_end|>"],
    ),
    "qwen3, tools: reasoning of the last question stays": (
        "qwen3", REASONED_CALLS[:4], [WEATHER], {},
        ["<think>\nAsk the tool.\n</think>\n\n"
         '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
         "<think>\nTell them.\n</think>\n\nIt is sunny.<|im_end|>"],
    ),
    "qwen3, tools: the prompt held reasoning that is gone": (
        "qwen3", REASONED_CALLS, [WEATHER], {},
        ['<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
         "It is sunny.<|im_end|>", "<think>\nBe kind.\n</think>\n\nWelcome.<|im_end|>"],
    ),
    "mistral": ("mistral", TWO_TURNS, None, {}, [" Hello! I am here.</s>", " It is 42.</s>"]),
    "mistral, the system message moves on": (
        "mistral", [SYSTEM, *TWO_TURNS], None, {}, [" Hello! I am here.</s>", " It is 42.</s>"],
    ),
    "mistral, tools": (
        "mistral", [SYSTEM, *CALLS], [WEATHER], {},
        ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}, "id": "abcdefghi"}]'
         "</s>",
         " It is sunny.</s>", " Welcome.</s>"],
    ),
    "gemma": ("gemma", TWO_TURNS, None, {}, ["Hello! I am here.<end_of_turn>", "It is 42.<end_of_turn>"]),
    # the line break is part of the token <|assistant|>, and each text between two such tokens begins with a
    # space
    "phi, an end of text after all": (
        "phi", [SYSTEM, *TWO_TURNS], None, {}, [" Hello! I am here.<|end|>", " It is 42.<|end|>"],
    ),
    "gpt-oss, earlier turns end otherwise": (
        "gpt-oss", [SYSTEM, *REASONED], None, {"reasoning_effort": "high"},
        ["<|channel|>final<|message|>Hello!<|end|>",
         "<|channel|>analysis<|message|>Let me see.\nYes.<|end|>"
         "<|start|>assistant<|channel|>final<|message|>It is 42.<|return|>"],
    ),
    "gpt-oss, tools": (
        "gpt-oss", REASONED_CALLS[:3], [WEATHER], {},
        ["<|channel|>analysis<|message|>Ask the tool.<|end|>"
         "<|start|>assistant to=functions.weather<|channel|>commentary json"
         '<|message|>{"city": "Paris"}<|call|>'],
    ),
    "gpt-oss, tools: the prompt held reasoning that is gone": (
        "gpt-oss", REASONED_CALLS, [WEATHER], {},
        [' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
         "<|channel|>final<|message|>It is sunny.<|end|>",
         (
             "<|channel|>analysis<|message|>Be "
             "kind.<|end|><|start|>assistant<|channel|>final<|message|>Welcome.<|return|>"
         )],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_server_would_generate_is_supervised(name: str) -> None:
    family, messages, tools, arguments, expected = CASES[name]
    tokenizer = family_tokenizer(family)
    tokens = masked(tokenizer, messages, tools, **arguments)
    assert stretches(tokenizer, tokens) == expected
    whole = tokenizer.apply_chat_template(
        validate_messages(messages, "row"), tools=tools, tokenize=True, return_dict=False, **arguments
    )
    assert tokens.input_ids == whole and not tokens.cut
    last = masked(tokenizer, messages, tools, "last", **arguments)
    assert last.input_ids == whole and stretches(tokenizer, last) == expected[-1:]


@pytest.mark.parametrize(
    ("family", "opening"), [("qwen2.5", ""), ("qwen3", "<think>\n\n</think>\n\n"), ("llama3", "")]
)
def test_the_tokens_before_a_turn_are_those_of_the_servers_prompt(family: str, opening: str) -> None:
    tokenizer = family_tokenizer(family)
    tokens = masked(tokenizer, TWO_TURNS)
    start = len(tokens.loss_mask) - tokens.loss_mask[::-1].index(False)
    prompt = tokenizer.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True, return_dict=False)
    ending = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    after = len(tokens.input_ids) - tokens.input_ids[::-1].index(ending)
    answer = tokenizer(opening + "It is 42." + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert tokens.input_ids[: len(prompt)] == prompt and tokens.input_ids[len(prompt) : after] == answer
    assert start == after or tokens.loss_mask[len(prompt) : after] == [True] * len(answer)


def test_a_token_across_the_start_of_an_answer_is_cut_as_a_server_cuts_it() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    messages = [user("Hi"), assistant("\nHello"), user("More"), assistant("Yes")]
    tokens = masked(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] != prompt  # the line breaks of header and answer are one token there
    assert tokens.cut and tokens.input_ids[: len(prompt)] == prompt
    assert stretches(tokenizer, tokens) == ["\nHello<|im_end|>", "Yes<|im_end|>"]
    assert tokenizer.decode(tokens.input_ids) == tokenizer.decode(whole)


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:"
    "{% if not loop.last or add_generation_prompt %}HEAD{% endif %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_tokenizer_that_reads_beginnings_in_a_way_of_its_own() -> None:
    """Sentence pieces put a space before a text: pieces tokenised apart differ, growing prefixes do not."""
    tokenizer = _plain("")
    assert stretches(
        tokenizer, masked(tokenizer, [user("Hi"), assistant("42."), user("So"), assistant("5")])
    ) == [
        "42.</s>",
        "5</s>",
    ]
    merging = _plain("Th")
    with pytest.raises(
        ValueError, match="row: a token runs across the beginning or the end of what the assistant says"
    ):
        masked(merging, [user("Hi"), assistant("e answer")])


def _plain(head: str) -> Any:
    """A tokenizer of sentence pieces whose template has no special token before the assistant's words."""
    return family_tokenizer("mistral", PLAIN.replace("HEAD", head))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}END{% endif %}"
)
UNCLEAR = r"messages\[3\] cannot be told from the rest: "
NO_END = (
    UNCLEAR
    + "the template writes no special token that ends the turn. "
    + "Copy the template to a file, put {% generation %}"
)
REFUSED = {
    "no generation prompt": (CHATML, TWO_TURNS, UNCLEAR + "the template ignores add_generation_prompt"),
    "another generation prompt": (
        CHATML + PROMPT.replace("assistant", "helper"), TWO_TURNS,
        UNCLEAR + "the generation prompt is not how the template",
    ),
    "no end of turn": (ENDLESS.replace("END", ""), TWO_TURNS, NO_END),
    "an end of all, but none of a turn": (
        ENDLESS.replace("END", "<|im_end|>"), TWO_TURNS, NO_END.replace("3", "1"),
    ),
    "the next turn's header is no end": (CHATML.replace("<|im_end|>", "") + PROMPT, TWO_TURNS, NO_END),
    "an end that depends on the words": (
        CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if m.content[0] == 'Z' else '<|endoftext|>\\n')")
        + PROMPT,
        TWO_TURNS, UNCLEAR.replace("3", "1") + "the way its turn ends depends on its words",
    ),
    "words left out": (
        CHATML.replace("m.content", "(m.content if m.role == 'user' else '')") + PROMPT,
        TWO_TURNS, r"the chat template leaves out what messages\[1\] \(assistant\) says",
    ),
    "the end of a turn in its words": (
        CHATML + PROMPT, [user("End?"), assistant("It is <|im_end|>.")],
        r"messages\[1\].content holds '<\|im_end\|>', the token that ends a turn",
    ),
    "a template that raises": (
        "{{ raise_exception('I am out of sorts') }}", TWO_TURNS,
        (
            "the chat template raised TemplateError on the first 4 messages: I am out of sorts. Correct or "
            "remove the row"
        ),
    ),
    "a template with a mistake": (
        "{{ messages[0].content + 1 }}", TWO_TURNS, "the chat template raised TypeError on the first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proven_is_refused(name: str) -> None:
    text, messages, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        masked(chatml(text), messages)
    assert str(caught.value).startswith("row: ")


def test_families_that_raise_name_the_row() -> None:
    with pytest.raises(
        ValueError, match="^row: the chat template raised TemplateError on .*: System role not supported"
    ):
        masked(family_tokenizer("gemma"), [SYSTEM, *TWO_TURNS])
    short = [user("Weather?"), assistant(tool_calls=[call(number="1", city="Paris")])]
    with pytest.raises(
        ValueError, match="^row: .*: Tool call IDs should be alphanumeric strings with length 9"
    ):
        masked(family_tokenizer("mistral"), short)


@pytest.mark.parametrize("messages", [REASONED, INLINE])
def test_reasoning_that_the_prompt_rules_out_is_refused(messages: Messages) -> None:
    tokenizer = family_tokenizer("qwen3")
    with pytest.raises(
        ValueError, match=UNCLEAR + "the generation prompt .* rule it out. data.chat_template_arguments may"
    ):
        masked(tokenizer, messages, enable_thinking=False)
    # earlier reasoning is dropped, also where it says what the answer says
    earlier = [user("Hi"), assistant("Hello!", reasoning="Hello!"), *TWO_TURNS[2:]]
    assert stretches(tokenizer, masked(tokenizer, earlier, enable_thinking=False)) == [
        "Hello!<|im_end|>",
        "It is 42.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("turn_end", "text_end", "supervised"),
    [
        (
            "<|endoftext|><|im_end|>\\n",
            "",
            "<|endoftext|><|im_end|>",
        ),  # two tokens end a turn, the second is the end token
        (
            "<|im_end|><|endoftext|>\\n",
            "",
            "<|im_end|>",
        ),  # the end token stops a server, whatever is written after it
        ("<|im_end|>", "<|endoftext|>", "<|im_end|>"),  # the second ends the text as a whole
        ("<|im_end|>\\n", "<|endoftext|>\\n", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("length", [2, 4])
def test_several_special_tokens_after_a_turn(
    turn_end: str, text_end: str, supervised: str, length: int
) -> None:
    after_all = f"{{% if not add_generation_prompt %}}{{{{ '{text_end}' }}}}{{% endif %}}"
    tokenizer = chatml(CHATML.replace("<|im_end|>\\n", turn_end) + after_all + PROMPT)
    expected = [message["content"] + supervised for message in TWO_TURNS[1:length:2]]
    assert stretches(tokenizer, masked(tokenizer, TWO_TURNS[:length])) == expected


def test_words_that_are_trimmed_away_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the chat template leaves out what messages\[1\] \(assistant\) says"
    ):
        masked(family_tokenizer("gemma"), [user("Hi"), assistant(" \n")])


def test_marks_are_taken_at_their_word() -> None:
    marked = chatml(template("qwen2.5-marked"))
    for supervise in ("all", "last"):
        assert masked(marked, TWO_TURNS, supervise=supervise) == masked(
            family_tokenizer("qwen2.5"), TWO_TURNS, supervise=supervise
        )
    last_only = chatml(
        template("qwen2.5-marked").replace(
            "message.role == 'assistant'", "message.role == 'assistant' and loop.last"
        )
    )
    with pytest.raises(
        ValueError,
        match=r"row: the {% generation %} marks of the chat template leave out messages\[1\]: put them",
    ):
        masked(last_only, TWO_TURNS)
    wordless = chatml(
        template("qwen2.5-marked").replace("message.content + '<|im_end|>' }}{%- end", "'' }}{%- end")
    )
    with pytest.raises(ValueError, match=r"the chat template leaves out what messages\[1\]"):
        masked(wordless, TWO_TURNS)


WORDS = st.one_of(
    st.sampled_from(
        [
            "assistant",
            "Hello",
            "\n",
            " ",
            "<think>",
            "im_end|>",
            "It is 42.",
            "\n\n",
            "Zq7x",
            "user\nHello",
            "é",
            "🦊",
        ]
    ),
    st.text(alphabet="ab \n\t.:'é<|>42", min_size=1, max_size=12),
)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["qwen2.5", "gemma", "llama3", "gpt-oss", "mistral"]),
    st.lists(WORDS, min_size=2, max_size=6),
)
def test_any_words_of_the_assistant_are_supervised_whole(family: str, words: list[str]) -> None:
    words = words[: len(words) // 2 * 2]
    trimming = family in ("gemma", "llama3", "mistral")
    words = [word if word.strip() or not trimming else "x" for word in words]
    messages = [user(word) if index % 2 == 0 else assistant(word) for index, word in enumerate(words)]
    tokenizer = family_tokenizer(family)
    said = [word.strip() if trimming else word for word in words[1::2]]
    before, after = {
        "qwen2.5": ("", "<|im_end|>"), "gemma": ("", "<end_of_turn>"), "llama3": ("", "<|eot_id|>"),
        "mistral": (" ", "</s>"), "gpt-oss": ("<|channel|>final<|message|>", "<|end|>"),
    }[family]  # fmt: skip
    expected = [before + word + after for word in said]
    if family == "gpt-oss":
        expected[-1] = expected[-1].replace("<|end|>", "<|return|>")
    tokens = masked(tokenizer, messages)
    assert stretches(tokenizer, tokens) == expected
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(tokens.input_ids) == tokenizer.decode(whole)
    assert tokens.input_ids == whole or tokens.cut


def count_renders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the text of every render from now on."""
    rendered: list[str] = []
    real = chat.render_jinja_template

    def render(**given: Any) -> Any:
        texts, marks = real(**given)
        rendered.extend(texts)
        return texts, marks

    monkeypatch.setattr(chat, "render_jinja_template", render)
    return rendered


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3", "mistral", "gpt-oss"])
def test_an_agents_log_takes_a_handful_of_renders(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = count_renders(monkeypatch)
    row = agent_log(60, 3)
    tokens = masked(family_tokenizer(family), row["messages"])
    assert len(stretches(family_tokenizer(family), tokens)) == 60 and len(rendered) <= 16


# What a template wants of calls

CALLERS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}"
    "{% if m.tool_calls is defined and WHEN %}{% for c in m.tool_calls %}{{ c.function.name + ARGUMENTS }}"
    "{% endfor %}{% else %}{{ m.content + '' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)


@pytest.mark.parametrize(
    ("when", "arguments", "renders"),  # those of the probe that raise are not counted
    [
        ("true", "c.function.arguments | tojson", 1),
        ("m.content is none", "c.function.arguments | tojson", 2),
        ("true", "c.function.arguments", 1),
        ("m.content is none", "c.function.arguments", 3),
    ],
)
def test_calls_are_given_as_the_template_wants_them(
    when: str, arguments: str, renders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family_tokenizer(
        "qwen2.5", CALLERS.replace("WHEN", when).replace("ARGUMENTS", f"({arguments})")
    )
    messages = [
        user("Hi"), assistant("", tool_calls=[call(a="x", b=[1, None])]), tool("21"), assistant("Done."),
    ]  # fmt: skip
    said = ['weather{"a": "x", "b": [1, null]}<|im_end|>', "Done.<|im_end|>"]
    assert stretches(tokenizer, masked(tokenizer, messages)) == said
    rendered = count_renders(monkeypatch)
    chat._call_form.cache_clear()
    masked(tokenizer, messages)
    probed = len(rendered)
    rendered.clear()
    masked(tokenizer, messages)
    assert probed - len(rendered) == renders
    words = [user("Hi"), assistant("Look.", tool_calls=[call(a="x")]), tool("21"), assistant("Done.")]
    left_out = locate(tokenizer, words).events
    assert left_out["calls_not_rendered"] == (when != "true")


def test_an_empty_result_of_a_tool_has_its_place() -> None:
    """The end of a turn that is not learnt has marks of its own, and stands before the result."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [user("Hi"), assistant("Look.") | {"weight": 0}, tool(""), assistant("Done.")]
    found = locate(family_tokenizer("qwen2.5", marked + PROMPT), messages)
    assert [found.text[first:last] for first, last in found.spans] == ["Done.", "<|im_end|>"]


def test_a_template_may_leave_out_messages_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CHATML.replace("for m in messages", "for m in messages if m.content")
    tokenizer = family_tokenizer("qwen2.5", kept + PROMPT)
    messages = [{"role": "system", "content": ""}, user("Hi"), assistant("Look."), tool(""), assistant("So.")]
    rendered = count_renders(monkeypatch)
    assert stretches(tokenizer, masked(tokenizer, messages)) == ["Look.<|im_end|>", "So.<|im_end|>"]
    assert len(rendered) <= 10


def test_context_that_a_template_leaves_out_is_counted() -> None:
    drops = CHATML.replace("m.content", "(m.content if m.weight is not defined else '')")
    tokenizer = family_tokenizer("qwen2.5", drops + PROMPT)
    messages = [user("Hi"), assistant("Drop.") | {"weight": 0}, user("So?"), assistant("Yes.")]
    assert locate(tokenizer, messages).events == Counter(context_not_rendered=1)


@pytest.mark.parametrize("text", ["Q: {} A:", "[INST] {}[/INST]", "  {}\n"])
def test_a_tokenizer_of_sentence_pieces_reads_a_long_text_once(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = _plain("")
    read: list[str] = []
    real = token_mask._encode

    def encode(own: Any, texts: list[str]) -> list[list[int]]:
        read.extend(texts)
        return real(own, texts)

    monkeypatch.setattr(token_mask, "_encode", encode)
    messages = [m for n in range(50) for m in (user(text.format(n)), assistant(f"No, {n}."))]
    tokens = masked(tokenizer, messages)
    assert sum(map(len, read)) < 8 * len(tokenizer.decode(tokens.input_ids))
    assert len(stretches(tokenizer, tokens)) == 50


TAGGED = {
    "results of tools as a user's words": [
        user("Weather?"),
        assistant("<tool_call>\n{}\n</tool_call>", reasoning_content="Ask."),
        user("<tool_response>\nsunny\n</tool_response>"),
        assistant("It is sunny.", reasoning_content="Tell."),
    ],
    "reasoning that was never opened": [user("Hi"), assistant("Hm.\n</think>\n\nHello!")],
    "white space around tags": [user(" <a> x </a> "), assistant("\n<think>Hm.</think>Hello!\n")],
    "tags alone": [user("<think>"), assistant("</b>")],
}


@pytest.mark.parametrize("name", TAGGED)
def test_marks_keep_the_tags_that_templates_look_for(name: str) -> None:
    template = load_chat_template(family_tokenizer("qwen3"))
    messages = validate_messages(TAGGED[name], "row")
    text = template.render(messages, None, "row")
    words = find_words(lambda given: template.render(given, None, "row"), text, messages)
    assert words is not None
    reasoning = [message.get("reasoning", "") for message in messages]
    assert {reasoning[part.message] for part in words.left_out} == {
        own for own in reasoning if own not in text
    }
    assert all(span is not None and span[0] < span[1] for span in words.spans)
