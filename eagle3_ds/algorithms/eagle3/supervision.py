"""Which slots of EAGLE-3's unroll are supervised (docs/semantics.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eagle3_ds.config import MaskAlignment
from eagle3_ds.layout import IntArray


@dataclass(frozen=True)
class TTTSupervision:
    """The rule: slot i is supervised at TTT step k if slot i + 1 + k is in the same document and the loss
    mask is true at the aligned token.

    Attributes:
        ttt_steps: K.
        alignment: `served` reads the mask at i + 1 + k, the last token that a server has when it makes the
            guess; `reference` reads it at i + k, as the paper's code does.
    """

    ttt_steps: int
    alignment: MaskAlignment = "served"

    @property
    def num_guesses(self) -> int:
        return self.ttt_steps

    @property
    def halo(self) -> int:
        """K: step k reads row i + 1 + k, so the last step reads row i + K."""
        return self.ttt_steps

    def slots_of(self, num_own_slots: int, supervised: NDArray[np.bool_]) -> int:
        """All that hold a token, as `layout.Supervision` has it."""
        return num_own_slots

    def __call__(
        self, document: IntArray, slots: IntArray, loss_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """As `layout.Supervision`: document int64 [padded length], slots int64 [n], loss_mask bool [L] ->
        bool [K, n].
        """
        beyond = np.concatenate((document, np.full(self.ttt_steps + 1, -1, dtype=np.int64)))
        mask = np.zeros(len(beyond), dtype=np.bool_)
        mask[: len(loss_mask)] = loss_mask
        read = slots[None, :] + 1 + np.arange(self.ttt_steps)[:, None]
        masked = mask[read if self.alignment == "served" else read - 1]
        return masked & (beyond[read] == document[slots]) & (document[slots] >= 0)
