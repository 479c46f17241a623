"""What preparation read, kept, cut and left out: counts, as JSON, as lines to print and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eagle3_ds.colors import BLUE, GREY
from eagle3_ds.data.findings import note_lines

NAMED = 3
"""Sources that are named when a shape is told."""
SUPERVISED, OTHER = BLUE, GREY


@dataclass(frozen=True)
class DataStatistics:
    """Counts of conversations, documents and tokens. Tokens are over the documents kept; supervised ones are
    the assistant's.

    Attributes:
        sources: each source and the shape of its rows, null where it has none.
        conversations: rows read. Each is one document, none (dropped), or several (split).
        bad_rows_dropped: rows left out because `data.on_bad_row` says so.
        notes: what a user should know of rows: how many, by the sentence that tells it.
        too_long_dropped, truncated, split: conversations longer than `data.max_length`, by what became of
            them.
        tokens_left_out: of the tokens of conversations read, those in no document.
        unsupervised_dropped: documents that a cut left without a word of the assistant.
        token_boundaries_cut: conversations where a token would have run across an end of a turn.
        reasoning_not_rendered, words_not_rendered, calls_not_rendered: of what the assistant says, what the
            template leaves out: messages with reasoning, messages with words, tool calls.
        context_not_rendered: messages that are not learnt (of the system, the user, a tool, or marked so) and
            that the template leaves out.
        prompts_not_met: conversations whose last turn stands without all of the server's prompt for it.
        ends_not_marked: turns whose end token is outside of the template's `{% generation %}` marks.
        ends_not_rendered: turns of tool calls that the template writes without a special token at their end.
        heldout_in_train: held-out documents that the training data holds too: only with `data.heldout`.
        packs: packed sequences of one epoch. fill: share of their slots that hold a token.
        histogram: training documents by length: upper end in tokens, documents, tokens, supervised tokens.
    """

    sources: Mapping[str, str | None]
    conversations: int
    train_documents: int
    heldout_documents: int
    bad_rows_dropped: int
    too_long_dropped: int
    truncated: int
    split: int
    tokens_left_out: int
    unsupervised_dropped: int
    token_boundaries_cut: int
    reasoning_not_rendered: int
    words_not_rendered: int
    calls_not_rendered: int
    context_not_rendered: int
    prompts_not_met: int
    ends_not_marked: int
    ends_not_rendered: int
    heldout_in_train: int
    train_tokens: int
    train_supervised_tokens: int
    heldout_tokens: int
    heldout_supervised_tokens: int
    longest: int
    packs: int
    fill: float
    histogram: Sequence[tuple[int, int, int, int]]
    notes: Mapping[str, int]

    def lines(self) -> list[str]:
        """What a person wants to know, one fact a line; what did not happen is not mentioned."""
        told = []
        for shape in dict.fromkeys(self.sources.values()):
            names = [source for source, own in self.sources.items() if own == shape]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            told.append(
                f"{f'rows of shape {shape}' if shape else 'no row'} in {', '.join(names[:NAMED])}{more}"
            )
        told.append(
            f"{self.train_documents:,} training documents, {self.train_supervised_tokens:,} of "
            f"{self.train_tokens:,} tokens supervised "
            f"({_share(self.train_supervised_tokens, self.train_tokens)}); {self.heldout_documents:,} held "
            f"out, {self.heldout_tokens:,} tokens; longest {self.longest:,}"
        )
        told.append(f"{self.packs:,} packed sequences, filled to {self.fill:.1%}")
        happened = (
            (self.bad_rows_dropped, "rows are bad and were dropped (data.on_bad_row)"),
            (self.too_long_dropped, "conversations are too long and were dropped"),
            (self.truncated, "conversations are too long and were truncated"),
            (self.split, "conversations are too long and were split"),
            (self.tokens_left_out, "tokens of the conversations read are in no document"),
            (self.unsupervised_dropped, "pieces without a word of the assistant were dropped"),
            (
                self.token_boundaries_cut,
                "conversations had a token that ran across an end of a turn; it was cut there",
            ),
            *self._not_learnt(),
            (self.heldout_in_train, "held-out documents are in the training data too"),
        )
        told += [f"{count:,} {what}" for count, what in happened if count]
        told += note_lines(self.notes)
        widest = max((documents for _, documents, _, _ in self.histogram), default=0)
        for upper, documents, tokens, _ in self.histogram:
            told.append(
                f"up to {upper:>9,} tokens {'#' * -(-40 * documents // widest):40} {documents:,} documents, "
                f"{tokens:,} tokens"
            )
        return told

    def _not_learnt(self) -> tuple[tuple[int, str], ...]:
        """What the chat template keeps from the draft: counts, and what to do about it."""
        return (
            (
                self.reasoning_not_rendered,
                "assistant messages have reasoning that the chat template leaves out, so that it is not "
                "learnt: end a row with each of them, name a template in data.chat_template that keeps "
                "reasoning, or let `data regenerate` write rows of tokens",
            ),
            (
                self.words_not_rendered,
                "assistant messages have words beside their tool calls that the chat template leaves out: "
                "name a template in data.chat_template that writes both",
            ),
            (
                self.calls_not_rendered,
                "tool calls of the assistant are left out by the chat template (beside words, or after the "
                "first call): name a template in data.chat_template that writes them",
            ),
            (
                self.context_not_rendered,
                "messages that are not learnt (of the system, the user, a tool, or marked so) are left out "
                "by the chat template",
            ),
            (
                self.prompts_not_met,
                "conversations end with a turn that lacks what the server's prompt opens it with, like "
                "<think>: give such rows reasoning, or set data.chat_template_arguments as on the server",
            ),
            (
                self.ends_not_marked,
                "turns have their end token outside of the chat template's {% generation %} marks, so that "
                "the draft does not learn to stop: put {% endgeneration %} after it",
            ),
            (
                self.ends_not_rendered,
                "turns of tool calls have no end token because the chat template writes none, so that the "
                "draft does not learn to stop there: name a template in data.chat_template that writes it",
            ),
        )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def length_histogram(lengths: np.ndarray, supervised: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(upper end, documents, tokens, supervised tokens) by powers of two, from the first that holds a
    document to the last.

    lengths, supervised: int64 [n], n >= 1.
    """
    powers = np.ceil(np.log2(lengths)).astype(int)  # exact: log2 of a power of two is
    rows = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        inside = powers == power
        rows.append((2**power, int(inside.sum()), int(lengths[inside].sum()), int(supervised[inside].sum())))
    return rows


def draw_lengths(statistics: DataStatistics, png: Path) -> None:
    """Documents and tokens of the training data by length, the supervised tokens apart."""
    labels = [f"{upper:,}" for upper, *_ in statistics.histogram]
    documents, tokens, supervised = (
        np.array(column) for column in list(zip(*statistics.histogram, strict=True))[1:]
    )
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.bar(labels, documents, color=SUPERVISED)
    left.set(title="Training documents by length", xlabel="tokens, up to", ylabel="documents")
    right.bar(labels, supervised, color=SUPERVISED, label="supervised")
    right.bar(labels, tokens - supervised, bottom=supervised, color=OTHER, label="context only")
    right.set(title="Tokens in documents of a length", xlabel="tokens, up to", ylabel="tokens")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.tick_params(axis="x", rotation=45)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.savefig(png)
