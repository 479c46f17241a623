"""vLLM's own connector for hidden states on a CPU: it runs inside a server, and all of it is vLLM's code but
the CUDA calls that it copies by, for which this module gives it ones that have nothing to wait for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as stock


class Done:
    """A CUDA stream or event with nothing on it: a CPU computes in the order of the calls."""

    def record(self, *streams: Any) -> None:
        """Nothing is under way."""

    def wait_event(self, event: Any) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def query(self) -> bool:
        return True


class Cuda:
    Stream = Event = Done

    @staticmethod
    def stream(stream: Done) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Torch:
    """torch, as the connector's module sees it."""

    cuda = Cuda

    @staticmethod
    def empty_like(tensor: torch.Tensor, device: str, pin_memory: bool) -> torch.Tensor:
        return torch.empty_like(tensor, device=device)  # memory is pinned for a GPU alone

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


stock.torch = Torch()


class StockOnCpu(stock.ExampleHiddenStatesConnector):
    """The connector itself."""
