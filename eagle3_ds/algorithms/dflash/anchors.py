"""Which slots draft a block in training (docs/dflash.md, "Which slots are anchors").

Every candidate has a key, a hash of seed, visit, document and position; those with the smallest are anchors.
So the choice does not depend on packing, order or mesh, and another visit chooses others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ds.algorithms.dflash.supervision import BlockSupervision

_STEP, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class SampledAnchors:
    """A share of each document's candidates: slots whose first guess counts. See `layout.Anchors`.

    Attributes:
        supervision: the rule that makes candidates.
        share: of a document's candidates, rounded up.
        seed: of the run.
    """

    supervision: BlockSupervision
    share: float
    seed: int

    def __call__(
        self, visit: int, documents: Sequence[int], lengths: Sequence[int], loss_mask: Tensor
    ) -> Tensor:
        """bool [L]: the anchors of a pack.

        Args:
            visit: how often the documents were seen before.
            documents: their ids; lengths: their tokens.
            loss_mask: bool [L].
        """
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        slots = np.arange(len(numbers))
        candidate = self.supervision(numbers, slots, loss_mask.numpy())[0]
        chosen = np.zeros(len(numbers), dtype=np.bool_)
        visited = mixed(mixed(np.uint64(self.seed)) ^ np.uint64(visit))
        start = 0
        for document, length in zip(documents, lengths, strict=True):
            places = np.flatnonzero(candidate[start : start + length])
            keys = mixed(mixed(visited ^ np.uint64(document)) ^ places.astype(np.uint64))
            # Stable, so that equal keys go by position.
            first = np.argsort(keys, kind="stable")[: math.ceil(self.share * len(places))]
            chosen[start + places[first]] = True
            start += length
        return torch.from_numpy(chosen)


def mixed(x: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 of each entry: 64-bit numbers, whose arithmetic wraps."""
    values = np.asarray(x, dtype=np.uint64).reshape(-1)
    with np.errstate(over="ignore"):
        values = values + _STEP
        values = (values ^ values >> np.uint64(30)) * _FIRST
        values = (values ^ values >> np.uint64(27)) * _SECOND
        values = values ^ values >> np.uint64(31)
    return values
