"""The costs of a P-EAGLE draft: EAGLE-3's, and two vectors."""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_ds.algorithms.eagle3.costs import Eagle3Shape


@dataclass(frozen=True)
class PEagleShape(Eagle3Shape):
    """Sizes of a P-EAGLE draft, and its costs."""

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor."""
        wide = 3 * self.hidden_size if self.aux_size is None else self.aux_size
        return (*super().parameter_sizes, self.hidden_size, wide)
