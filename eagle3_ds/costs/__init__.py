"""The inputs of the cost formulas: the sizes of a draft (`DraftShape`) and one way of running it (`Setup`).
The formulas themselves are in the draft algorithms and in `eagle3_ds.plan`.
"""

from eagle3_ds.costs.amounts import FP32, INT64, Flops, Parts, SequenceBytes, Traffic
from eagle3_ds.costs.setup import (
    ITEMSIZE,
    Activation,
    DraftShape,
    ExchangeName,
    Setup,
    ZeroGroup,
    ZeroSettings,
)

__all__ = [
    "FP32",
    "INT64",
    "ITEMSIZE",
    "Activation",
    "DraftShape",
    "Flops",
    "ExchangeName",
    "Parts",
    "SequenceBytes",
    "Setup",
    "Traffic",
    "ZeroGroup",
    "ZeroSettings",
]
