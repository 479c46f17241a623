"""Names that a recipe may say and that other rooms know: the lists are one."""

from __future__ import annotations

from typing import get_args

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.attention.usp import EXCHANGES
from eagle3_ds.config import (
    AttentionSection,
    DataSection,
    DraftSection,
    ExchangeName,
    ExportSection,
    LossSection,
)
from eagle3_ds.data.shapes import Shape
from eagle3_ds.kernels import KERNELS
from eagle3_ds.losses import LOSSES


def said(section: type, key: str) -> tuple[object, ...]:
    """What a key of the recipe may be."""
    return get_args(section.model_fields[key].annotation)  # type: ignore[attr-defined]


def test_every_name_of_the_recipe_is_something_and_everything_has_a_name() -> None:
    assert said(DraftSection, "algorithm") == tuple(ALGORITHMS)
    assert set(said(LossSection, "kind")) == set(LOSSES)
    assert set(said(AttentionSection, "kernel")) == {"auto", *(kernel.name for kernel in KERNELS)}
    assert get_args(ExchangeName) == tuple(EXCHANGES)
    assert set(said(DataSection, "shape")) == {"auto", *get_args(Shape)}
    formats = get_args(said(ExportSection, "formats")[0])
    for algorithm in ALGORITHMS.values():
        assert set(algorithm.layouts) == set(formats)
