"""The costs of a P-EAGLE draft: EAGLE-3's and two vectors, less what its masks need not do and keep in the
first layer.

Legend: Q live slots of a rank, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_ds.algorithms.eagle3.costs import Eagle3Shape
from eagle3_ds.costs import FP32, Setup


@dataclass(frozen=True)
class PEagleShape(Eagle3Shape):
    """Sizes of a P-EAGLE draft, and its costs."""

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor."""
        wide = 3 * self.hidden_size if self.aux_size is None else self.aux_size
        return (*super().parameter_sizes, self.hidden_size, wide)

    @property
    def projected_once(self) -> int:
        """q, k and v: all masks are one state there."""
        weights = self.layer_weights(0)
        return sum(weights[name] for name in ("q", "k", "v"))

    def kept_less(self, setup: Setup) -> int:
        """A mask's input is one row for all slots: no hidden state [Q, H] is kept, nor what autograd would
        keep of its norms.
        """
        entries = setup.live_slots * self.hidden_size
        if setup.activation != "keep":
            return entries * setup.itemsize
        norms = 2 * setup.itemsize if setup.device == "accelerator" else 3 * FP32
        return entries * (2 * setup.itemsize + norms)
