"""The draft algorithms, a folder each, and the dictionary of them. Their contract is in draft/contract.py."""

from collections.abc import Mapping

from eagle3_ds.algorithms.dflash.algorithm import DFlash
from eagle3_ds.algorithms.eagle3.algorithm import Eagle3
from eagle3_ds.algorithms.peagle.algorithm import PEagle
from eagle3_ds.config import Recipe
from eagle3_ds.draft.contract import DraftAlgorithm

ALGORITHMS: Mapping[str, DraftAlgorithm] = {
    algorithm.name: algorithm for algorithm in (Eagle3(), PEagle(), DFlash())
}


def algorithm_of(recipe: Recipe) -> DraftAlgorithm:
    """The algorithm that the recipe's `draft.algorithm` names."""
    return ALGORITHMS[recipe.draft.algorithm]


__all__ = ["ALGORITHMS", "algorithm_of"]
