"""What formulas of bytes, calls and seconds read: a draft's sizes and one way of running it. Nothing is
computed here.
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
