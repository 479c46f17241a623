"""Regeneration with a target of our own making: which messages it answers, what is written, and going on
after a stop.
"""

import copy
import json

import pytest

from eagle3_ds.data.chat import load_chat_template
from eagle3_ds.data.prepare import prepare_data, recipe_rows
from eagle3_ds.data.regenerate import Regenerator
from tests.unit.chat_families import family_tokenizer
from tests.unit.data_samples import chat, data_recipe

END = "<|im_end|>"


class Parrot:
    """Answers with the last line that it hears, in capitals, and notes what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prompts, self.draws, self.sizes = [], [], []

    def __call__(self, prompts, draw):
        self.draws.append(draw)
        self.sizes.append(len(prompts))
        heard = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts += heard
        return [self.tokenizer(self.answer(text), add_special_tokens=False)["input_ids"] for text in heard]

    def answer(self, text):
        said = text.removesuffix(f"{END}\n<|im_start|>assistant\n").rpartition("\n")[2]
        if said == "endless":
            return "and so on"
        return said.upper() + END


@pytest.fixture
def tokenizer():
    return family_tokenizer("qwen2.5")


def prompt_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def regenerate(
    tmp_path, tokenizer, rows, parrot=None, context=1000, stop_after=None, batch_size=2, end=None, **settings
):
    """The lines of the output, the regenerator and the parrot."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parrot = parrot or Parrot(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END) if end is None else end
    output = tmp_path / "out" / "answers.jsonl"
    regenerator = Regenerator(
        tokenizer, load_chat_template(tokenizer), parrot, [end], context, 50, output, settings
    )
    section = data_recipe(tmp_path, train=(str(path),)).data
    for number, _ in enumerate(regenerator.run(recipe_rows(section.train, section), batch_size), 1):
        if number == stop_after:
            break
    return [json.loads(line) for line in output.read_text().splitlines()], regenerator, parrot


def learnt(row, tokenizer):
    """The text of the supervised tokens."""
    tokens = [token for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag]
    return tokenizer.decode(tokens)


def texts(rows, tokenizer):
    return [learnt(row, tokenizer) for row in rows]


def test_every_answer_is_made_anew_on_top_of_the_answers_before(tmp_path, tokenizer):
    rows = [{"messages": chat("a", "old", "b", "old", system="s")}, {"messages": chat("c", "old")}]
    lines, regenerator, parrot = regenerate(tmp_path, tokenizer, rows)
    assert texts(lines, tokenizer) == [f"A{END}B{END}", f"C{END}"]
    assert lines[0]["input_ids"][: len(prompt := prompt_of(tokenizer, parrot.prompts[2]))] == prompt
    assert parrot.sizes == [2, 1] and len(set(parrot.draws)) == 2
    assert "<|im_start|>assistant\nA<|im_end|>" in parrot.prompts[2] and not any(
        "old" in text for text in parrot.prompts
    )
    assert lines[0]["source"].endswith("rows.jsonl, line 1")
    told = regenerator.lines()
    assert "2 rows read, 2 conversations with 3 answers of 6 tokens as 2 tokenised rows in" in told[0]
    assert told[1:] == []


def test_a_recipe_reads_what_was_written(tmp_path, tokenizer):
    regenerate(tmp_path, tokenizer, [{"messages": chat("a", "x", "b", "y")}])
    recipe = data_recipe(tmp_path, train=(str(tmp_path / "out" / "answers.jsonl"),), heldout_fraction=0.0)
    data = prepare_data(recipe, tokenizer, "tok", show_progress=False)
    assert texts(data.train, tokenizer) == [f"A{END}B{END}"]


def test_tool_calls_and_their_results_stay(tmp_path, tokenizer):
    call = {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [{"name": "f", "arguments": {"x": 1}}],
    }
    talk = [
        {"role": "user", "content": "a"},
        call,
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "old"},
    ]
    lines, _, parrot = regenerate(tmp_path, tokenizer, [{"messages": talk, "tools": [{"name": "f"}]}])
    assert texts(lines, tokenizer) == [f"</TOOL_RESPONSE>{END}"]
    assert len(parrot.prompts) == 1 and '"arguments": {"x": 1}' in parrot.prompts[0]


def test_answers_that_cannot_be_kept_end_their_conversation(tmp_path, tokenizer):
    rows = [chat("a", "x", "endless", "x", "b", "x"), chat("long " * 30, "x"), chat("c", "x")]
    lines, regenerator, _ = regenerate(tmp_path, tokenizer, [{"messages": row} for row in rows], context=180)
    assert texts(lines, tokenizer) == [f"A{END}", f"C{END}"]
    counts = regenerator.counts
    assert (counts["unfinished"], counts["too_long"], counts["left_out"]) == (1, 1, 1)
    assert "1 rows have no answer and were left out" in regenerator.lines()


class Scripted:
    """Answers with the given texts, one a draw."""

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers, self.prompts = tokenizer, list(answers), []

    def __call__(self, prompts, draw):
        self.prompts += prompts
        answer = self.answers.pop(0)
        return [prompt_of(self.tokenizer, answer) for _ in prompts]


@pytest.mark.parametrize(
    ("family", "answers", "heard"),
    [
        ("qwen2.5", ["One.<|im_end|>", "Two.<|im_end|>"], "assistant\nOne.<|im_end|>"),
        (
            "qwen3",
            ["<think>\nHm.\n</think>\n\nOne.<|im_end|>", "<think>\nOh.\n</think>\n\nTwo.<|im_end|>"],
            "assistant\nOne.<|im_end|>",
        ),
        (
            "gpt-oss",
            [
                f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{word}<|return|>"
                for word in ("One.", "Two.")
            ],
            "<|channel|>final<|message|>One.<|end|>",
        ),
        ("gemma", ["One.<end_of_turn>", "Two.<end_of_turn>"], "One.<end_of_turn>"),
        ("mistral", ["One.</s>", "Two.</s>"], "One.</s>"),
    ],
)
def test_every_family_gets_the_very_tokens(tmp_path, family, answers, heard):
    tokenizer = family_tokenizer(family)
    scripted = Scripted(tokenizer, *answers)
    end = prompt_of(tokenizer, answers[0])[-1]
    rows = [{"messages": chat("a", "old", "b", "old")}]
    lines, regenerator, _ = regenerate(tmp_path, tokenizer, rows, scripted, end=end)
    asked = [
        prompt + prompt_of(tokenizer, answer)
        for prompt, answer in zip(scripted.prompts, answers, strict=True)
    ]
    # The second prompt goes on from the first answer, or the template has dropped its reasoning by then.
    goes_on = asked[1][: len(asked[0])] == asked[0]
    assert [line["input_ids"] for line in lines] == (asked[1:] if goes_on else asked)
    assert sum(sum(line["loss_mask"]) for line in lines) == regenerator.counts["tokens"]
    assert lines[-1]["loss_mask"][len(scripted.prompts[1]) :] == [1] * len(prompt_of(tokenizer, answers[1]))
    assert heard in tokenizer.decode(scripted.prompts[1])
    assert family not in ("qwen3", "gpt-oss") or not goes_on


def test_an_answer_of_reasoning_alone_ends_its_conversation(tmp_path, tokenizer):
    scripted = Scripted(tokenizer, f"<think>\nHm.\n</think>{END}")
    lines, regenerator, _ = regenerate(
        tmp_path, tokenizer, [{"messages": chat("a", "x", "b", "x")}], scripted
    )
    assert texts(lines, tokenizer) == [f"<think>\nHm.\n</think>{END}"]
    assert "1 answers say nothing but reasoning; their conversations end with them" in regenerator.lines()


def test_an_interrupted_run_goes_on(tmp_path, tokenizer):
    rows = [{"messages": chat(f"q{number}", "x")} for number in range(7)]
    lines, first, _ = regenerate(tmp_path, tokenizer, rows, stop_after=2, seed=1)
    assert len(lines) == 4 and first.rows == 4
    with open(first.output, "a") as stream:
        stream.write('{"messages": [half a li')
    lines, second, parrot = regenerate(tmp_path, tokenizer, rows, seed=1)
    assert texts(lines, tokenizer) == [f"Q{number}{END}" for number in range(7)]
    assert len(parrot.prompts) == 3 and second.counts["answers"] == 7
    whole = tmp_path / "whole"
    whole.mkdir()
    _, other, again = regenerate(whole, tokenizer, rows, seed=1)
    whole_lines = [json.loads(line) for line in other.output.read_text().splitlines()]
    assert [line["input_ids"] for line in whole_lines] == [line["input_ids"] for line in lines]
    assert again.draws[2:] == parrot.draws
    assert regenerate(tmp_path, tokenizer, rows, seed=1)[2].prompts == []


def test_a_file_of_other_making_is_not_touched(tmp_path, tokenizer):
    rows = [{"messages": chat("a", "x")}]
    _, first, _ = regenerate(tmp_path, tokenizer, rows, seed=1)
    with pytest.raises(ValueError, match="was begun otherwise .seed 1 then, 2 now.: restore these settings"):
        regenerate(tmp_path, tokenizer, rows, seed=2)
    first.output.write_text("")
    with pytest.raises(ValueError, match="answers.jsonl is shorter than answers.jsonl.progress.json says"):
        regenerate(tmp_path, tokenizer, rows, seed=1)
    first.progress_file.unlink()
    with pytest.raises(
        ValueError, match="answers.jsonl exists and was not begun by this command: name another file"
    ):
        regenerate(tmp_path, tokenizer, rows, seed=1)
    with pytest.raises(ValueError, match="rows.jsonl, line 1: a row of tokens has no prompts to answer"):
        (tmp_path / "x").mkdir()
        regenerate(tmp_path / "x", tokenizer, [{"input_ids": [1, 2], "loss_mask": [0, 1]}])


def test_what_a_row_gives_to_its_template_and_what_is_context(tmp_path, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template
    talk = chat("a", "kept", "b", "old")
    talk[1]["weight"] = 0
    rows = [
        {"messages": talk, "chat_template_kwargs": {"style": "own"}},
        {"messages": chat("c", "old")},
    ]
    lines, _, parrot = regenerate(tmp_path, tokenizer, rows)
    assert texts(lines, tokenizer) == [f"B{END}", f"C{END}"]
    assert parrot.prompts[0].startswith("own<|im_start|>") and "kept<|im_end|>" in parrot.prompts[0]
    assert parrot.prompts[1].startswith("<|im_start|>")
