"""The target's own answers to the prompts of a data set: a draft learns best from the text of the model it
drafts for.

Rows are read in order, in batches; every assistant message that is no tool call, and is to be learnt, is
answered anew, on top of the answers before it. What is written is a JSONL file of tokenised rows that a
recipe reads: the very tokens of prompts and answers, for no template can be trusted to give an answer back as
it was. Beside it stands how far it has come, so that an interrupted run goes on with the next batch.

Where a server answers, many rows are under way at a time, and each is written when those before it are.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from eagle3_ds.data.chat import ChatTemplate, is_learnt
from eagle3_ds.data.disguise import THINK
from eagle3_ds.data.findings import Findings
from eagle3_ds.data.shapes import TokenRow, read_row
from eagle3_ds.data.sources import Row
from eagle3_ds.patient_http import ServerGoneError, ServerTroubleError

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, number of the draw) -> the tokens after each prompt, the one that stops it included where it came
to that.
"""

DRAWS = 1000
"""Numbers of draws that are kept for each row."""
AHEAD = 8
"""Rows under way or waiting to be written, for each row that is asked for at a time."""
TROUBLES = 8
"""Rows in a row that got no answer, after which it is the server that is to blame, and not the rows."""
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


@dataclass
class _Outcome:
    """What came of some rows: lines to write, and counts of what happened; `reason` where a row failed, and
    whether that is the server's trouble rather than the row's.
    """

    number: int
    place: str = ""
    written: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reason: str | None = None
    is_trouble: bool = False


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
        self._tokenizing = threading.Lock()  # a tokenizer that a file tells to pad or cut changes in use
        self.failed: list[dict[str, str]] = []
        """Place and reason of every row that failed."""
        self.rows, self.counts = self._resume()

    def run(self, rows: Iterable[Row], batch_size: int) -> Iterator[int]:
        """Answer the rows that are not answered yet; yields how many rows a batch had, once it is on disk."""
        left = islice(rows, self.rows, None)
        while batch := list(islice(left, batch_size)):
            outcome = _Outcome(len(batch))
            self._answer(batch, self.rows * DRAWS, outcome)
            self._write([outcome])
            yield len(batch)

    def run_concurrently(self, rows: Iterable[Row], workers: int, drop: bool) -> Iterator[int]:
        """Answer the rows that are not answered yet, many at a time, each written after those before it;
        yields how many rows went to disk. Rows that fail are put down in `failed`.

        Args:
            workers: rows asked for at a time.
            drop: whether rows at the very end may fail by the server's trouble; else they stay unanswered, so
                that the next run asks for them again.

        Raises:
            ServerGoneError: the server is gone, or one row after the other gets no answer from it.
        """
        left, held = enumerate(islice(rows, self.rows, None), self.rows), list[_Outcome]()
        with _Crew(workers) as crew:
            waiting: deque[Future[_Outcome]] = deque()
            while True:
                for number, row in islice(left, AHEAD * workers - len(waiting)):
                    waiting.append(crew.submit(partial(self._attempt, row, number)))
                if not waiting:
                    break
                gone = _take_finished(waiting, held)
                if sure := _sure(held):
                    self._write(held[:sure])
                    yield sure
                    del held[:sure]
                if gone is not None:
                    raise gone
                if sum(one.is_trouble for one in held) >= TROUBLES:
                    raise _no_answers(held)
        if held and not drop:
            raise _no_answers(held)
        if held:
            self._write(held)
            yield len(held)

    def _attempt(self, row: Row, number: int) -> _Outcome:
        outcome = _Outcome(1, row.place)
        try:
            self._answer([row], number * DRAWS, outcome)
        except ServerGoneError:
            raise
        except ValueError as error:
            reason = str(error).removeprefix(f"{row.place}: ")
            return _Outcome(1, row.place, reason=reason, is_trouble=isinstance(error, ServerTroubleError))
        return outcome

    def _write(self, outcomes: Sequence[_Outcome]) -> None:
        """Put outcomes on disk, and then that they are there."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for one in outcomes for row in one.written]
        with open(self.output, "a", encoding="utf-8") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        for outcome in outcomes:
            self.rows += outcome.number
            self.counts.update(outcome.counts)
            if outcome.reason is not None:
                self.failed.append({"row": outcome.place, "reason": outcome.reason})
        self._save()

    def failures(self) -> ValueError | None:
        """All failed rows by their faults, as one error; None without any."""
        findings = Findings()
        for failure in self.failed:
            findings.add_bad(failure["row"], failure["reason"])
        return findings.error(self.rows) if self.failed else None

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
            "unfinished": (
                "answers did not end within sampling.max_new_tokens; their conversations end before them"
            ),
            "wordless": "answers say nothing but reasoning; their conversations end with them",
        }
        told += [f"{counts[name]:,} {what}" for name, what in happened.items() if counts[name]]
        if self.failed:
            told.append(
                f"{len(self.failed):,} rows failed; {self.progress_file} lists them with their reasons"
            )
        return told

    def _answer(self, batch: Sequence[Row], draw: int, outcome: _Outcome) -> None:
        """Fill in the rows of tokens that come of the rows that got an answer; `draw` numbers the first."""
        talks = []
        for row in batch:
            content = read_row(row.value(), row.shape, row.place)
            if isinstance(content, TokenRow):
                raise ValueError(
                    f"{row.place}: a row of tokens has no prompts to answer: name rows of messages"
                )
            template = self.template.with_arguments(content.arguments)
            talks.append(_Talk(row, template, content.tools, list(content.messages)))
        speaking, counts = talks, outcome.counts
        while speaking := [talk for talk in speaking if talk.next_prompt()]:
            speaking = self._one_answer_each(speaking, draw, counts)
            draw += 1
        answered = sum(bool(talk.written) for talk in talks)
        outcome.written = [
            {"input_ids": ids, "loss_mask": mask, "source": talk.row.place}
            for talk in talks
            for ids, mask in talk.written
        ]
        counts.update(conversations=answered, left_out=len(talks) - answered, written=len(outcome.written))

    def _one_answer_each(self, talks: list[_Talk], draw: int, counts: Counter[str]) -> list[_Talk]:
        """Let the target speak once in each conversation; returns those that can go on."""
        prompts, asked = [], []
        for talk in talks:
            text = talk.template.render(talk.messages, talk.tools, talk.row.place, prompt=True)
            with self._tokenizing:
                prompt = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(prompt) > self.longest_prompt:
                counts["too_long"] += 1
            else:
                prompts.append(prompt)
                asked.append(talk)
        answers = self.generate(prompts, draw) if prompts else []
        return [
            talk
            for talk, prompt, tokens in zip(asked, prompts, answers, strict=True)
            if self._accept(talk, prompt, tokens, counts)
        ]

    def _accept(self, talk: _Talk, prompt: list[int], tokens: list[int], counts: Counter[str]) -> bool:
        """Add the answer when it is whole; whether the conversation can go on from it."""
        if not tokens or tokens[-1] not in self.stops:
            counts["unfinished"] += 1
            return False
        counts.update(answers=1, tokens=len(tokens))
        talk.answer(prompt, tokens)
        words = self._words(tokens[:-1])
        if not words.strip():
            counts["wordless"] += 1
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
            self.rows, self.counts = 0, Counter()
            self._save()
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
        self.failed = progress.get("failed", [])
        return progress["rows"], Counter(progress["counts"])

    def _save(self) -> None:
        progress = {
            "settings": self.settings,
            "rows": self.rows,
            "bytes": self.output.stat().st_size,
            "counts": dict(self.counts),
            "failed": self.failed,
        }
        aside = self.progress_file.with_name(f".{self.progress_file.name}")
        aside.write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.progress_file)


def _take_finished(waiting: deque[Future[_Outcome]], held: list[_Outcome]) -> ServerGoneError | None:
    """Wait for the next row, and move it and those after it that are done to `held`, up to one that found
    the server gone.
    """
    try:
        held.append(waiting.popleft().result())
        while waiting and waiting[0].done():
            held.append(waiting.popleft().result())
    except ServerGoneError as error:
        return error
    return None


def _sure(held: Sequence[_Outcome]) -> int:
    """How many of these rows, from the first, can be written.

    A row that the server had trouble with is put down as failed when the server has answered a later one:
    a server that is dying must not cost rows.
    """
    places = range(len(held))
    trouble = next((place for place in places if held[place].is_trouble), len(held))
    answered = [
        place + 1 for place in places if held[place].counts["answers"] + held[place].counts["unfinished"]
    ]
    return max([trouble, *answered])


def _no_answers(held: Sequence[_Outcome]) -> ServerGoneError:
    rows = [one for one in held if one.is_trouble]
    return ServerGoneError(
        f"{len(rows)} rows got no answer, and no row after them did: {rows[-1].place}: {rows[-1].reason}. "
        "Look at the server's log, and start it anew if need be; the same command then goes on with them."
    )


class _Crew:
    """Threads that do jobs in order. They are daemons: after Ctrl-C nobody waits for an answer under way."""

    def __init__(self, size: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[_Outcome], Callable[[], _Outcome]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(size)]

    def __enter__(self) -> _Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Jobs that nobody has begun are given up."""
        while True:
            try:
                self._jobs.get_nowait()
            except Empty:
                break
        for _thread in self._threads:
            self._jobs.put(None)

    def submit(self, job: Callable[[], _Outcome]) -> Future[_Outcome]:
        future: Future[_Outcome] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while (one := self._jobs.get()) is not None:
            future, job = one
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
