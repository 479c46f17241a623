"""What formulas of bytes, calls and seconds read: a draft's sizes and one way of running it. Nothing is
computed here.
"""

from eagle3_ds.costs.setup import (
    ITEMSIZE,
    Activation,
    ExchangeName,
    Setup,
    ZeroGroup,
    ZeroSettings,
)
from eagle3_ds.costs.shape import FP32, INT64, DraftShape, Flops, Parts, SequenceBytes, Traffic

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
