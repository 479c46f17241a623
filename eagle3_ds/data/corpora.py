"""The corpora that need no file: a word in `data.train` or `target.build.text` names one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from eagle3_ds.data.exercises import exercise_conversations, exercises_fingerprint
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_fingerprint, stdlib_text


@dataclass(frozen=True)
class Corpus:
    """Rows `{"messages": [...]}`, plain documents for a target that is built, and a sha256 over both."""

    conversations: Callable[[], Iterable[dict]]
    texts: Callable[[], Iterable[str]]
    fingerprint: Callable[[], str]


CORPORA = {
    "stdlib": Corpus(stdlib_conversations, stdlib_text, stdlib_fingerprint),
    "exercises": Corpus(exercise_conversations, tuple, exercises_fingerprint),
}
