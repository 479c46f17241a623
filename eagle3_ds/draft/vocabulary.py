"""The draft vocabulary: the most frequent supervised tokens of the target's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY = ("d2t", "t2d")
"""The names of its tensors."""


@dataclass(frozen=True)
class VocabularyMap:
    """Which tokens of the target's vocabulary the draft can guess.

    Attributes:
        d2t: int64 [Vd], offsets: draft id i stands for the target id i + d2t[i].
        t2d: bool [V], whether a target id is in the draft vocabulary.
    """

    d2t: Tensor
    t2d: Tensor

    @staticmethod
    def from_counts(counts: Tensor, draft_vocab_size: int, always: Tensor | None = None) -> VocabularyMap:
        """The tokens of `always`, then the most frequent ones (of equal ones the lower id), until there are
        `draft_vocab_size`. Draft ids are in the order of target ids.

        Args:
            counts: int64 [V], how often each token is supervised.
            draft_vocab_size: Vd.
            always: int64 [n], ids that are included however rare they are: special and end tokens.

        Raises:
            ValueError: the draft vocabulary is larger than the target's, or too small for the tokens of
                `always`.
        """
        if draft_vocab_size > len(counts):
            raise ValueError(
                f"draft.vocab_size = {draft_vocab_size} is larger than the target's vocabulary of "
                f"{len(counts)}: the draft predicts a subset of the target's tokens. Use at most "
                f"{len(counts)}."
            )
        if always is not None:
            if len(always) > draft_vocab_size:
                raise ValueError(
                    f"draft.vocab_size = {draft_vocab_size} is smaller than the {len(always)} special and "
                    f"end tokens that every draft vocabulary holds. Use at least {len(always)}."
                )
            counts = counts.clone()
            counts[always] = torch.iinfo(counts.dtype).max
        kept = torch.argsort(counts, descending=True, stable=True)[:draft_vocab_size].sort().values
        t2d = torch.zeros(len(counts), dtype=torch.bool)
        t2d[kept] = True
        return VocabularyMap(kept - torch.arange(draft_vocab_size), t2d)

    @property
    def draft_to_target(self) -> Tensor:
        """int64 [Vd]: the target id of each draft id."""
        return self.d2t + torch.arange(len(self.d2t))

    def exported(self) -> dict[str, Tensor]:
        """The tensors d2t and t2d that servers read, on the CPU; none for a draft that guesses every token by
        the target's own id. vLLM 0.32 and speculators 0.9 have no such tensors for it, and vLLM refuses them.
        """
        is_whole = len(self.d2t) == len(self.t2d) and not bool(self.d2t.any())
        return {} if is_whole else {"d2t": self.d2t.cpu(), "t2d": self.t2d.cpu()}

    @staticmethod
    def of_export(
        tensors: Mapping[str, Tensor], draft_vocab_size: int, vocab_size: int
    ) -> VocabularyMap | None:
        """The map among the tensors of an export with these sizes; None where it is missing."""
        if set(VOCABULARY) <= tensors.keys():
            return VocabularyMap(tensors["d2t"], tensors["t2d"])
        if draft_vocab_size != vocab_size or set(VOCABULARY) & tensors.keys():
            return None
        return VocabularyMap(
            torch.zeros(vocab_size, dtype=torch.int64), torch.ones(vocab_size, dtype=torch.bool)
        )

    def equals(self, other: VocabularyMap) -> bool:
        return torch.equal(self.d2t, other.d2t) and torch.equal(self.t2d, other.t2d)

    def save(self, path: str | Path) -> None:
        """Write d2t and t2d to a safetensors file."""
        save_file({"d2t": self.d2t, "t2d": self.t2d}, str(path))
        Path(path).chmod(0o644)  # safetensors makes files that only their owner can read

    @staticmethod
    def load(path: str | Path) -> VocabularyMap:
        """Read what `save` has written."""
        tensors = load_file(str(path))
        return VocabularyMap(tensors["d2t"], tensors["t2d"])
