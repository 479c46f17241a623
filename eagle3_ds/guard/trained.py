"""What the guards ask of the trainer that they watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import Topology


class StepFigures(Protocol):
    """Of one optimizer step, the same on every rank: the loss, the loss of each TTT step, and the gradient's
    norm.
    """

    @property
    def loss(self) -> float: ...

    @property
    def step_loss(self) -> Sequence[float]: ...

    @property
    def grad_norm(self) -> float | None: ...


class Trained(Protocol):
    """A trainer. Its methods are collective."""

    recipe: Recipe
    topology: Topology
    engine: Any

    def frozen_tensors(self) -> list[Tensor]:
        """What is not trained and the same on every rank."""

    def own_losses(self, pack: PackedSequence) -> tuple[Tensor, bool]:
        """This rank's share of the summed loss of each TTT step, fp32 [K], and whether its hidden states are
        finite.
        """
