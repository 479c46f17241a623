"""Which guesses of a block count (docs/dflash.md, "What is supervised")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.layout import IntArray


@dataclass(frozen=True)
class BlockSupervision:
    """The rule: a slot whose first guess counts is a candidate, and no other slot is ever an anchor. Which
    candidates are chosen is `PackedSequence.anchors`; where that is None, all are.

    Attributes:
        num_guesses: K.
        alignment: `served`: guess k of slot i counts if the token at i + 1 + k is the assistant's and of the
            document, as for EAGLE-3; `predicted`: if those at i + 1 and at i + 2 + k are.
    """

    num_guesses: int
    alignment: Literal["served", "predicted"] = "served"

    @property
    def halo(self) -> int:
        """K: guess k reads row i + 1 + k."""
        return self.num_guesses

    def __call__(
        self, document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """As `layout.Supervision`: document int64 [padded length], slots int64 [n], loss_mask bool [L] ->
        bool [K, n].
        """
        counts = self._counts(document, slots, loss_mask)
        return counts & counts[0]

    def slots_of(self, num_own_slots: int, supervised: NDArray[np.bool_]) -> int:
        """The anchors, as `layout.Supervision` has it."""
        return int(supervised[0].sum())

    def _counts(self, document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which guesses would count, bool [K, n], were every slot an anchor."""
        if self.alignment == "served":
            return TTTSupervision(self.num_guesses)(document, slots, loss_mask)
        # Guess k is about what EAGLE-3's guess k + 1 has read; what its guess 0 has read is the newest token.
        newest, *guessed = TTTSupervision(self.num_guesses + 1)(document, slots, loss_mask)
        return np.stack(guessed) & newest
