"""The target's own answers to the prompts of a data set: a draft learns best from the text of the model it
drafts for.

Rows are read in order, in batches; every assistant message that is no tool call is answered anew, on top of
the answers before it. What is written is a JSONL file of `messages` that a recipe reads, and beside it how
far it has come, so that an interrupted run goes on with the next batch.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eagle3_ds.data.chat import REASONING_KEYS, ChatTemplate, Conversation
from eagle3_ds.data.shapes import TokenRow, read_row
from eagle3_ds.data.sources import Row
from eagle3_ds.data.token_mask import mask_tokens
from eagle3_ds.data.turns import locate_turns

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, number of the draw) -> the tokens after each prompt, the one that stops it included where it came
to that.
"""


@dataclass
class _Talk:
    """A conversation on its way: the messages so far, and those of the data that are still to come."""

    row: Row
    tools: list[dict[str, Any]] | None
    coming: list[dict[str, Any]]
    messages: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    """How many messages there were after the last answer."""

    def next_prompt(self) -> bool:
        """Take over messages of the data up to the next answer; False when there is none."""
        while self.coming:
            message = self.coming.pop(0)
            if message["role"] == "assistant" and "tool_calls" not in message:
                return True
            self.messages.append(message)
        return False

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.answered = len(self.messages)


class Regenerator:
    """Answers rows by `generate` and appends them to the file `output`.

    Args:
        stops: token ids that end an answer.
        context: longest prompt with its answer, in tokens; max_new_tokens: longest answer.
        settings: what the answers depend on; a file begun with others is not continued.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        generate: Generate,
        stops: Sequence[int],
        context: int,
        max_new_tokens: int,
        output: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.generate = generate
        self.stops = frozenset(stops)
        self.longest_prompt = context - max_new_tokens
        self.output = output
        self.progress_file = output.with_name(output.name + ".progress.json")
        self.settings = dict(settings)
        self.rows, self.counts = self._resume()
        self.unreadable: str | None = None
        """Why the last answer that cannot be told from the template's text cannot."""

    def run(self, rows: Iterable[Row], batch_size: int) -> Iterator[int]:
        """Answer the rows that are not answered yet; yields how many rows a batch had, once it is on disk."""
        left = islice(rows, self.rows, None)
        while batch := list(islice(left, batch_size)):
            lines = [json.dumps(talk, ensure_ascii=False) + "\n" for talk in self._answer(batch)]
            with open(self.output, "a", encoding="utf-8") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
            self.rows += len(batch)
            self._save(self.rows, self.counts)
            yield len(batch)

    def lines(self) -> list[str]:
        """What came of the rows, one fact a line."""
        counts = self.counts
        told = [
            f"{self.rows:,} rows read, {counts['written']:,} conversations with {counts['answers']:,} "
            f"answers of {counts['tokens']:,} tokens in {self.output}",
            f"{counts['same_tokens']:,} of {counts['answers']:,} answers are read back token for token",
        ]
        happened = {
            "left_out": "rows have no answer and were left out",
            "too_long": "prompts leave no room for an answer; their conversations end before them",
            "unfinished": "answers did not end within --max_new_tokens; their conversations end before them",
            "unreadable": "answers cannot be told from the template's text again; "
            "their conversations end before them",
        }
        told += [f"{counts[name]:,} {what}" for name, what in happened.items() if counts[name]]
        return told if self.unreadable is None else [*told, f"the last answer of these: {self.unreadable}"]

    def _answer(self, batch: Sequence[Row]) -> list[dict[str, Any]]:
        """One written conversation for each row that got an answer."""
        talks = []
        for row in batch:
            content = read_row(row.value(), row.shape, row.place)
            if isinstance(content, TokenRow):
                raise ValueError(
                    f"{row.place}: a row of tokens has no prompts to answer: name rows of messages"
                )
            talks.append(_Talk(row, content.tools, list(content.messages)))
        speaking, draw = talks, 0
        while speaking := [talk for talk in speaking if talk.next_prompt()]:
            speaking = self._one_answer_each(speaking, self.rows * 1000 + draw)
            draw += 1
        written = [talk for talk in talks if talk.answered]
        self.counts.update(written=len(written), left_out=len(talks) - len(written))
        return [_as_row(talk) for talk in written]

    def _one_answer_each(self, talks: list[_Talk], draw: int) -> list[_Talk]:
        """Let the target speak once in each conversation; returns those that can go on."""
        prompts, asked = [], []
        for talk in talks:
            text = self.template.render(talk.messages, talk.tools, talk.row.place, prompt=True)
            prompt = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(prompt) > self.longest_prompt:
                self.counts["too_long"] += 1
            else:
                prompts.append(prompt)
                asked.append(talk)
        answers = self.generate(prompts, draw) if prompts else []
        return [talk for talk, tokens in zip(asked, answers, strict=True) if self._accept(talk, tokens)]

    def _accept(self, talk: _Talk, tokens: list[int]) -> bool:
        """Add the answer when it is whole and the template can hold it."""
        if not tokens or tokens[-1] not in self.stops:
            self.counts["unfinished"] += 1
            return False
        text = self.tokenizer.decode(
            tokens[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        conversation = Conversation([*talk.messages, {"role": "assistant", "content": text}], talk.tools)
        try:
            rendered, spans = locate_turns(self.template, conversation, "last", talk.row.place)
            masked = mask_tokens(self.tokenizer, [rendered], [spans], [talk.row.place])[0]
        except ValueError as error:
            self.counts["unreadable"] += 1
            self.unreadable = str(error)
            return False
        learnt = [token for token, flag in zip(masked.input_ids, masked.loss_mask, strict=True) if flag]
        self.counts.update(answers=1, tokens=len(tokens), same_tokens=int(learnt == tokens))
        talk.answer(text)
        return True

    def _resume(self) -> tuple[int, Counter[str]]:
        """Rows done and their counts; what was written of a batch that was not finished is cut off."""
        if not self.progress_file.is_file():
            if self.output.exists():
                raise ValueError(
                    f"--output: {self.output} exists and was not begun by this command: name another file"
                )
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.touch()
            self._save(0, Counter())
        progress = json.loads(self.progress_file.read_text(encoding="utf-8"))
        changed = [
            f"{name} {progress['settings'].get(name)!r} then, {value!r} now"
            for name, value in self.settings.items()
            if progress["settings"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"--output: {self.output} was begun otherwise ({'; '.join(changed)}): restore these settings "
                "to go on with it, or name another file"
            )
        size = self.output.stat().st_size if self.output.is_file() else -1
        if size < progress["bytes"]:
            raise ValueError(
                f"--output: {self.output} is shorter than {self.progress_file.name} says: bring it back, or "
                "remove both to begin anew"
            )
        os.truncate(self.output, progress["bytes"])
        return progress["rows"], Counter(progress["counts"])

    def _save(self, rows: int, counts: Counter[str]) -> None:
        size = self.output.stat().st_size
        progress = {"settings": self.settings, "rows": rows, "bytes": size, "counts": dict(counts)}
        aside = self.progress_file.with_name(f".{self.progress_file.name}")
        aside.write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.progress_file)


def _as_row(talk: _Talk) -> dict[str, Any]:
    """What is written: the conversation up to its last answer, reasoning of the data's own under one name."""
    messages = [
        {key: value for key, value in message.items() if key not in REASONING_KEYS[1:]}
        for message in talk.messages[: talk.answered]
    ]
    row: dict[str, Any] = {"messages": messages, "source": talk.row.place}
    return row if talk.tools is None else {**row, "tools": talk.tools}
