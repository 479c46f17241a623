"""The target's own answers to the prompts of a data set: a draft learns best from the text of the model it
drafts for.

Rows are read in order, in batches; every assistant message that is no tool call, and is to be learnt, is
answered anew, on top of the answers before it. What is written is a JSONL file of tokenised rows that a
recipe reads: the very tokens of prompts and answers, for no template can be trusted to give an answer back as
it was. Beside it stands how far it has come, so that an interrupted run goes on with the next batch.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eagle3_ds.data.chat import ChatTemplate, is_learnt
from eagle3_ds.data.disguise import THINK
from eagle3_ds.data.shapes import TokenRow, read_row
from eagle3_ds.data.sources import Row

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, number of the draw) -> the tokens after each prompt, the one that stops it included where it came
to that.
"""


END_OF_REASONING = re.compile(rf".*(?:</{THINK}>|\[/{THINK.upper()}\])\s*", flags=re.DOTALL)


@dataclass
class _Talk:
    """A conversation on its way: the messages so far, those of the data that are still to come, and the rows
    of tokens that come of it.
    """

    row: Row
    template: ChatTemplate
    tools: list[dict[str, Any]] | None
    coming: list[dict[str, Any]]
    messages: list[dict[str, Any]] = field(default_factory=list)
    written: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Token ids and mask of each row."""

    def next_prompt(self) -> bool:
        """Take over messages of the data up to the next answer; False when there is none."""
        while self.coming:
            message = self.coming.pop(0)
            if message["role"] == "assistant" and "tool_calls" not in message and is_learnt(message):
                return True
            self.messages.append(message)
        return False

    def answer(self, prompt: list[int], tokens: list[int]) -> None:
        """Take up an answer's tokens: into the row before, where the prompt goes on from it to the token; in
        a row of its own where the template renders earlier turns otherwise by now.
        """
        ids, mask = self.written[-1] if self.written else ([], [])
        if not ids or prompt[: len(ids)] != ids:
            ids, mask = [], []
            self.written.append((ids, mask))
        mask += [0] * (len(prompt) - len(ids)) + [1] * len(tokens)
        ids += prompt[len(ids) :] + tokens


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
        self.settings = {**settings, "rows": "tokenised"}
        self.rows, self.counts = self._resume()

    def run(self, rows: Iterable[Row], batch_size: int) -> Iterator[int]:
        """Answer the rows that are not answered yet; yields how many rows a batch had, once it is on disk."""
        left = islice(rows, self.rows, None)
        while batch := list(islice(left, batch_size)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._answer(batch)]
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
            f"{self.rows:,} rows read, {counts['conversations']:,} conversations with {counts['answers']:,} "
            f"answers of {counts['tokens']:,} tokens as {counts['written']:,} tokenised rows in {self.output}"
        ]
        happened = {
            "left_out": "rows have no answer and were left out",
            "too_long": "prompts leave no room for an answer; their conversations end before them",
            "unfinished": "answers did not end within --max_new_tokens; their conversations end before them",
            "wordless": "answers say nothing but reasoning; their conversations end with them",
        }
        return told + [f"{counts[name]:,} {what}" for name, what in happened.items() if counts[name]]

    def _answer(self, batch: Sequence[Row]) -> list[dict[str, Any]]:
        """The rows of tokens that come of the rows that got an answer."""
        talks = []
        for row in batch:
            content = read_row(row.value(), row.shape, row.place)
            if isinstance(content, TokenRow):
                raise ValueError(
                    f"{row.place}: a row of tokens has no prompts to answer: name rows of messages"
                )
            template = self.template.with_arguments(content.arguments)
            talks.append(_Talk(row, template, content.tools, list(content.messages)))
        speaking, draw = talks, 0
        while speaking := [talk for talk in speaking if talk.next_prompt()]:
            speaking = self._one_answer_each(speaking, self.rows * 1000 + draw)
            draw += 1
        answered = sum(bool(talk.written) for talk in talks)
        written = [
            {"input_ids": ids, "loss_mask": mask, "source": talk.row.place}
            for talk in talks
            for ids, mask in talk.written
        ]
        self.counts.update(conversations=answered, left_out=len(talks) - answered, written=len(written))
        return written

    def _one_answer_each(self, talks: list[_Talk], draw: int) -> list[_Talk]:
        """Let the target speak once in each conversation; returns those that can go on."""
        prompts, asked = [], []
        for talk in talks:
            text = talk.template.render(talk.messages, talk.tools, talk.row.place, prompt=True)
            prompt = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(prompt) > self.longest_prompt:
                self.counts["too_long"] += 1
            else:
                prompts.append(prompt)
                asked.append(talk)
        answers = self.generate(prompts, draw) if prompts else []
        return [
            talk
            for talk, prompt, tokens in zip(asked, prompts, answers, strict=True)
            if self._accept(talk, prompt, tokens)
        ]

    def _accept(self, talk: _Talk, prompt: list[int], tokens: list[int]) -> bool:
        """Add the answer when it is whole; whether the conversation can go on from it."""
        if not tokens or tokens[-1] not in self.stops:
            self.counts["unfinished"] += 1
            return False
        self.counts.update(answers=1, tokens=len(tokens))
        talk.answer(prompt, tokens)
        words = self._words(tokens[:-1])
        if not words.strip():
            self.counts["wordless"] += 1
            return False
        talk.messages.append({"role": "assistant", "content": words})
        return True

    def _words(self, tokens: list[int]) -> str:
        """What a server gives a user of an answer, who sends it back with the next question: what follows the
        reasoning, and the last special token (where an answer has several channels).
        """
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return END_OF_REASONING.sub("", self.template.special.split(text)[-1])

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
