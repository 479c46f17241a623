"""A stand-in for vLLM that serves a real target: it gives the hidden states that transformers computes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from eagle3_ds.config import TargetSection
from eagle3_ds.targets import capture_hidden_states, load_target, target_fingerprint, teacher_tokens
from tests.unit.fake_server import FakeServer


def server_of_target(folder: Path, rows: Path, **settings: Any) -> FakeServer:
    """A server of the target in `folder`, in float32, that writes into `rows`."""
    target = load_target(TargetSection(path=str(folder), dtype="float32"))
    one_at_a_time = threading.Lock()

    def served(token_ids: list[int]) -> tuple[torch.Tensor, int]:
        """As a server gives them: the last state is the one before the final norm."""
        last: list[torch.Tensor] = []
        with one_at_a_time:  # the hooks are the model's, not a thread's
            hook = target.base.norm.register_forward_pre_hook(lambda module, given: last.append(given[0][0]))
            aux, teacher = capture_hidden_states(target, torch.tensor(token_ids))
            hook.remove()
        states = torch.cat([aux.unflatten(1, (3, -1)), last[0][:, None]], dim=1)
        return states, int(teacher_tokens(teacher[-1:], target.head))

    weights = target_fingerprint(folder, target.aux_layers, "float32")["target_weights"]
    about = {
        "format": "eagle3_ds rows 1",
        "layer_ids": ",".join(map(str, (*target.aux_layers, target.config.num_hidden_layers))),
        "vocab_size": str(target.config.vocab_size),
        "dtype": "float32",
        "target_weights": weights,
    }
    rows.mkdir(exist_ok=True)
    return FakeServer(rows, served, about, **settings)
