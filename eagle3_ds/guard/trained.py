"""The parts of a trainer that the guards use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import Topology


class StepFigures(Protocol):
    """Loss, loss of each TTT step, and gradient norm of one optimizer step; the same on every rank."""

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
        """The tensors that are not trained, whole and equal on every rank."""

    def own_losses(self, pack: PackedSequence) -> tuple[Tensor, bool]:
        """Run one pack without gradients. Collective.

        Returns:
            The loss of each of the K TTT steps summed over this rank's slots, fp32 [K], and whether the
            hidden states that this rank read are finite.
        """
