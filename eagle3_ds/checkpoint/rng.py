"""The random states of a rank as tensors: torch on CPU and device, numpy, Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "rng/"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Every generator's state by name, as integers and floats that safetensors can hold."""
    version, words, gauss = random.getstate()
    arrays: dict[str, Any] = dict(np.random.get_state(legacy=False))
    assert (version, arrays["bit_generator"]) == (3, "MT19937")
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        # NaN stands for: no second half of a Gaussian pair is waiting.
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(arrays["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([arrays["state"]["pos"], arrays["has_gauss"]]),
        "numpy_gauss": torch.tensor([arrays["gauss"]], dtype=torch.float64),
    }
    if device.type != "cpu":
        states["device"] = getattr(torch, device.type).get_rng_state(device)
    return {f"{PREFIX}{name}": state for name, state in states.items()}


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """The inverse. A state of a device that this rank does not have is left out."""
    states = {name.removeprefix(PREFIX): state for name, state in states.items()}
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if np.isnan(gauss) else gauss))
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *states["numpy_position"].tolist(), states["numpy_gauss"].item()))
    if device.type != "cpu" and "device" in states:
        getattr(torch, device.type).set_rng_state(states["device"], device)
