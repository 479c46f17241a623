"""Names for the parts of a step in a profile: `@marked("attention")` above a function marks its calls in a
trace of torch.profiler. Without a profiler a mark is one question to torch, and nothing is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

Given = ParamSpec("Given")
Result = TypeVar("Result")

PREFIX = "part: "
"""Before the name of a part in a trace, so that it is told from torch's own names."""
DATA, INPUTS, REPORT, OPTIMIZER = "data", "inputs", "report", "optimizer"
FORWARD, BACKWARD = "layers, forward", "layers, backward"
ATTENTION, LOSS, EXCHANGE = "attention", "loss", "exchange"


def marked(name: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Mark a function's calls as this part of a step. A part within another does not count in the outer."""

    def mark(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @functools.wraps(function)
        def with_mark(*arguments: Given.args, **named: Given.kwargs) -> Result:
            # record_function alone takes 6 microseconds also where nobody records.
            if not torch.autograd._profiler_enabled():
                return function(*arguments, **named)
            with record_function(PREFIX + name):
                return function(*arguments, **named)

        return with_mark

    return mark
