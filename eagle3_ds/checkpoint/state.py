"""What a checkpoint is made of: the training state of one rank, whoever keeps it, as fragments of whole
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eagle3_ds.checkpoint.format import Fragment
from eagle3_ds.config import Recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.topology import Topology


@dataclass(frozen=True)
class FlatMaster:
    """A master, the very fp32 tensor that AdamW steps and keys its state by, and the fragments of parameters
    in it.
    """

    tensor: Tensor
    fragments: tuple[Fragment, ...]


def shares(masters: list[FlatMaster], index: int, count: int) -> list[FlatMaster]:
    """The `index`-th of `count` equal cuts of every fragment."""
    cuts = ([fragment.share(index, count) for fragment in master.fragments] for master in masters)
    return [
        FlatMaster(master.tensor, tuple(cut for cut in own if cut.numel))
        for master, own in zip(masters, cuts, strict=True)
    ]


class TrainingState(Protocol):
    """This rank's training state. `train/state.py` reads it out of a DeepSpeed engine.

    Attributes:
        masters: what this rank holds; the ranks that ZeRO shards over together hold every parameter exactly
            once.
        replica: which of how many equal copies of that this rank is: copies write a part each.
        parameter_shapes: whole shapes, by the draft's parameter names.
        adam_steps: updates that AdamW has made, which its bias correction depends on.
        skipped_steps: steps that were not finite and made no update.
        versions: of the packages whose state it is.
    """

    @property
    def recipe(self) -> Recipe: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def vocabulary(self) -> VocabularyMap: ...

    @property
    def masters(self) -> list[FlatMaster]: ...

    @property
    def replica(self) -> tuple[int, int]: ...

    @property
    def zero_stage(self) -> int: ...

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def adam_steps(self) -> int: ...

    @property
    def skipped_steps(self) -> int: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def read(self, master: FlatMaster) -> dict[str, Tensor]:
        """The flat master and its two moments by kind, fp32: views."""

    def write(self, adam_steps: int, read: Callable[[str, Fragment], Tensor]) -> None:
        """Fill masters and moments from `read(kind, fragment)`, fp32 [numel], then the weights from the
        masters. Collective.
        """

    def count_steps(self, steps: int, skipped_steps: int) -> None:
        """Set the counters of whoever steps: optimizer steps done, and those of them that were skipped."""
