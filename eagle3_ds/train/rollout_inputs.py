"""What a caller hands to `RolloutTrainer`: texts with the target's hidden states, a draft vocabulary; and
what is wrong with them.

Legend: L tokens of a packed sequence, Ht hidden size of the target, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.layout import LocalRows, Rows, Supervision, live_slots, row_tiles

ROWS_AT_ONCE = 4096
"""How many rows are copied to the host at a time while a rollout is checked."""


@dataclass(frozen=True)
class Texts:
    """Documents (prompt and answer) laid end to end.

    Attributes:
        token_ids: integers [L], whole on every rank.
        loss_mask: bool [L], whole on every rank; true for the tokens that the target wrote.
        lengths: the tokens of each document; their sum is L.
    """

    token_ids: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Rollout(Texts):
    """A packed sequence with the target's hidden states.

    Attributes:
        aux: rows [L, layers * Ht]: the inputs of the captured layers, concatenated. A tensor, or an object
            whose `[start:stop]` returns those rows. A rank reads only the rows of its own slots.
        teacher: rows [L, Ht]: the target's output after the final norm, as a tensor or such an object. A rank
            reads the rows of its own slots and of the halo after each of its spans.
        teacher_token: integers [L], whole on every rank: the target's argmax over its vocabulary. None
            computes it from `teacher`.
    """

    aux: Rows
    teacher: Rows
    teacher_token: Tensor | None = None


@dataclass(frozen=True)
class ServedRollout(Texts):
    """A packed sequence whose hidden states a server wrote to files, by `serving.connector`.

    Attributes:
        files: of each document, on a file system that this rank sees; its rows are those of the document's
            tokens. A rank reads the rows of its own slots and of their halo. They are kept: `discard`
            removes those that `RolloutTrainer.ask` had written.
    """

    files: tuple[Path, ...]


AnyRollout: TypeAlias = Rollout | ServedRollout


class HostRows:
    """Rows on any device, copied to the CPU as they are read: the trainer copies each tile to its device."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitem__(self, rows: slice) -> Tensor:
        return self._rows[rows].detach().cpu()


def check_tokens(rollout: Texts, vocab_size: int) -> int:
    """Check the columns [L] of a rollout, and return L.

    Raises:
        ValueError: columns of different lengths, or a token that the target does not have.
    """
    length = len(rollout.token_ids)
    if not rollout.lengths or min(rollout.lengths) < 1 or sum(rollout.lengths) != length:
        raise ValueError(
            f"lengths is {list(rollout.lengths)[:8]} with the sum {sum(rollout.lengths)}, and token_ids has "
            f"{length} tokens: give the length of every document, each at least 1"
        )
    columns = {
        "token_ids": rollout.token_ids,
        "loss_mask": rollout.loss_mask,
        "teacher_token": rollout.teacher_token if isinstance(rollout, Rollout) else None,
    }
    for name, column in columns.items():
        if column is None:
            continue
        if column.shape != (length,) or column.is_floating_point():
            raise ValueError(
                f"{name} is {column.dtype} {tuple(column.shape)}, expected integers or booleans ({length},)"
            )
        if name == "loss_mask":
            vocabulary, what = 2, "0 or 1"
        else:
            vocabulary, what = vocab_size, f"a token of the target, below {vocab_size}"
        strange = ((column < 0) | (column >= vocabulary)).nonzero()
        if len(strange):
            place = int(strange[0])
            raise ValueError(
                f"{name} holds {int(column[place])} at row {place}, expected {what}: correct the rollout"
            )
    return length


def check_supervised(lengths: Sequence[int], loss_mask: Tensor, supervision: Supervision) -> None:
    """Raises ValueError when no token is there to be learnt: the step would be one of loss 0."""
    if not live_slots(lengths, loss_mask, supervision).any():
        raise ValueError(
            f"loss_mask marks {int(loss_mask.sum())} of {len(loss_mask)} rows, and none that a draft could "
            "learn: a document's first token has no state before it. Mark the tokens that the target "
            "wrote, or leave this rollout out"
        )


def checked_rows(
    name: str, rows: Rows, slots: NDArray[np.int64], length: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (slots int64 [n], rows [n, width]) for the slots that hold a token, up to `ROWS_AT_ONCE` at a
    time. Slots of `length` and above are padding.

    Raises:
        ValueError: rows have another shape or dtype, or hold an infinity or a NaN.
    """
    if isinstance(rows, Tensor) and rows.shape != (length, width):
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}, expected {(length, width)}: the target's states of "
            f"{length} tokens"
        )
    slots = slots[slots < length]
    local = LocalRows(rows, slots, length)
    for tile in row_tiles(len(slots), ROWS_AT_ONCE):
        piece = local.take(tile)
        if piece.shape != (len(tile), width) or not piece.is_floating_point():
            raise ValueError(
                f"{name} gives {piece.dtype} {tuple(piece.shape)}, expected floating point "
                f"{(len(tile), width)}"
            )
        finite = torch.isfinite(piece).all(-1)
        if not finite.all():
            row = int(slots[tile][int(finite.logical_not().nonzero()[0])])
            raise ValueError(
                f"{name} is not finite at row {row}: leave that document out, or mend what computed it"
            )
        yield torch.from_numpy(slots[tile]), piece


def draft_vocabulary(
    recipe: Recipe, given: VocabularyMap | Tensor | str | Path | None, vocab_size: int
) -> VocabularyMap:
    """The draft vocabulary, from what the caller gave or from what lies in the output folder.

    Raises:
        ValueError: none was found, or it is of another target or another size than the recipe's.
    """
    size, file = recipe.draft.vocab_size, Path(recipe.output_dir) / "vocabulary.safetensors"
    if isinstance(given, str | Path) and not Path(given).is_file():
        raise ValueError(
            f"vocabulary is {str(given)!r}, which is no file: name the vocabulary.safetensors of a run"
        )
    if given is None and file.is_file():
        given = file
    if given is None and size == vocab_size:
        given = torch.zeros(vocab_size, dtype=torch.int64)
    if given is None:
        raise ValueError(
            f"draft.vocab_size is {size} of the target's {vocab_size} tokens, and {file} does not say which: "
            "pass `vocabulary`, the path of such a file or how often each token was answered; name a draft "
            f"in train.init_from; or set draft.vocab_size to {vocab_size}"
        )
    if isinstance(given, Tensor):
        if given.shape != (vocab_size,) or given.dtype != torch.int64 or bool((given < 0).any()):
            raise ValueError(
                f"vocabulary is {given.dtype} {tuple(given.shape)}, expected counts, int64 ({vocab_size},) "
                "and none below 0: torch.bincount(answers, minlength=the target's vocabulary)"
            )
        return VocabularyMap.from_counts(given, size)
    found = VocabularyMap.load(given) if isinstance(given, str | Path) else given
    if (len(found.d2t), len(found.t2d)) != (size, vocab_size):
        raise ValueError(
            f"the vocabulary has {len(found.d2t)} of {len(found.t2d)} tokens, and the recipe "
            f"{size} (draft.vocab_size) of the target's {vocab_size}: give the one that belongs to this "
            "target, or set draft.vocab_size to its size"
        )
    return found
