"""The training state of one rank as checkpoints see it: fragments of whole parameters in fp32 masters.

A *master* is an fp32 tensor that AdamW steps. A *fragment* is a run of consecutive elements of one flattened
parameter, and the place where they lie in a master.
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
    """A master and the fragments of parameters in it.

    Attributes:
        tensor: the tensor object that AdamW steps and keys its state by; fp32, of any shape.
        fragments: which elements of which parameters lie where in the flattened tensor.
    """

    tensor: Tensor
    fragments: tuple[Fragment, ...]


def shares(masters: list[FlatMaster], index: int, count: int) -> list[FlatMaster]:
    """The masters with the `index`-th of `count` nearly equal cuts of every fragment."""
    cuts = ([fragment.share(index, count) for fragment in master.fragments] for master in masters)
    return [
        FlatMaster(master.tensor, tuple(cut for cut in own if cut.numel))
        for master, own in zip(masters, cuts, strict=True)
    ]


class TrainingState(Protocol):
    """This rank's training state. `train/state.py` implements it for a DeepSpeed engine.

    Attributes:
        masters: the masters that this rank holds. Those of all ranks that ZeRO shards over hold every element
            of every parameter exactly once.
        replica: (index, count): `count` ranks hold equal masters, and this is number `index` of them. In a
            checkpoint each of them writes one part.
        parameter_shapes: whole shapes, by the draft's parameter names.
        adam_steps: updates that AdamW has made; its bias correction depends on them.
        skipped_steps: steps that were not finite and made no update.
        versions: versions of the packages whose state this is, by package.
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
        """Views of a master and its two moments by kind, each flattened to fp32 [n]: what this rank holds."""

    def write(self, adam_steps: int, read: Callable[[str, Fragment], Tensor]) -> None:
        """Fill this rank's masters and moments, then copy the masters into the weights. Collective.

        Args:
            adam_steps: the updates that AdamW has made.
            read: returns the elements of a fragment, fp32 [fragment.numel], of the kind given.
        """

    def count_steps(self, steps: int, skipped_steps: int) -> None:
        """Set the engine's counters: the optimizer steps done, and how many of them were skipped."""
