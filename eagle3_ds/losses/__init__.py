"""The losses of a guess, one file each. Each has a plain form for autograd, and a form for one tile of logits
with its gradient written by hand.
"""

from collections.abc import Callable, Mapping

from eagle3_ds.config import LossSection
from eagle3_ds.draft.tile_loss import TileLoss
from eagle3_ds.losses.kl import KL
from eagle3_ds.losses.lk_alpha import LKAlpha
from eagle3_ds.losses.lk_lambda import LKLambda
from eagle3_ds.losses.tv import TotalVariation

LOSSES: Mapping[str, Callable[[LossSection], TileLoss]] = {
    "kl": lambda section: KL(),
    "tv": lambda section: TotalVariation(),
    "lk_alpha": lambda section: LKAlpha(),
    "lk_lambda": lambda section: LKLambda(section.lk_eta),
}


def loss_of(section: LossSection) -> TileLoss:
    """The loss that the recipe's `loss.kind` names."""
    return LOSSES[section.kind](section)


__all__ = ["LOSSES", "loss_of"]
