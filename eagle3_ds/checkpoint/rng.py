"""A rank's random states as tensors: those of torch on CPU and device, numpy and Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle3_ds.device.runtime import random_state, restore_random_state

PREFIX = "rng/"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators of this rank, by name, in dtypes that safetensors can store."""
    version, words, gauss = random.getstate()
    arrays: dict[str, Any] = dict(np.random.get_state(legacy=False))
    assert (version, arrays["bit_generator"]) == (3, "MT19937")
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        # `gauss` is the second of a pair of Gaussian numbers, kept for the next call. NaN: none is kept.
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(arrays["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([arrays["state"]["pos"], arrays["has_gauss"]]),
        "numpy_gauss": torch.tensor([arrays["gauss"]], dtype=torch.float64),
    }
    if device.type != "cpu":
        states["device"] = random_state(device)
    return {f"{PREFIX}{name}": state for name, state in states.items()}


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set all generators of this rank to what `random_states` returned. Without a device its state is
    ignored.
    """
    states = {name.removeprefix(PREFIX): state for name, state in states.items()}
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if np.isnan(gauss) else gauss))
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *states["numpy_position"].tolist(), states["numpy_gauss"].item()))
    if device.type != "cpu" and "device" in states:
        restore_random_state(states["device"], device)
