"""The whole training step on a kind of accelerator that no vendor sells: nothing in it is left that takes the
accelerator for CUDA.

The tensors are torch's "PrivateUse1", a device type of its own; an operation that mixes them with CPU tensors
is refused, as on a GPU. torch finds the device's module, DeepSpeed an accelerator of that name, and the
process group a backend for it. What the step comes to is held against the same step on the CPU.

What this proves: every tensor of the step lies where it should; streams, random states, peak memory and a
trainer that sleeps are reached through the device room alone, and torch.cuda by no room; one line in the
table of kinds is enough; a rank that is shown one device takes it whatever LOCAL_RANK says.

A judge of vector clocks (stream_order.py) finds nothing that one stream could overtake of another's, no
matter how the device orders them, and finds each wait that is taken away.

What it does not: pinned memory, which is the host's here; collectives between ranks; DeepSpeed's own streams,
which it has on CUDA alone; the numbers of a real device's operations, which are the CPU's here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.pretend_accelerator import KIND, STEPS

ROOT = Path(__file__).parents[2]
STREAMS = {f"torch.{KIND}.{name}" for name in ("Stream", "stream", "current_stream")}
OTHERS = {
    f"torch.{KIND}.{name}"
    for name in (
        "device_count",
        "set_device",
        "synchronize",
        "get_rng_state",
        "set_rng_state",
        "max_memory_allocated",
        "empty_cache",
    )
}

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="the pretended device is compiled, and no C++ compiler is here"
)


def trained(kind: str, activation: str, deepspeed_config: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.ranks.pretend_accelerator", kind, activation, deepspeed_config]
    # ninja, which compiles the device, lies beside Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    result = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("activation", "deepspeed_config", "tolerance"),
    [("recompute", "zero0", 1e-6), ("offload", "zero2", 1e-3), ("recompute", "zero3", 1e-3)],
)
def test_the_step_runs_on_a_kind_that_is_not_cuda(
    activation: str, deepspeed_config: str, tolerance: float
) -> None:
    there, here = (trained(kind, activation, deepspeed_config) for kind in (KIND, "cpu"))
    assert (there["device"], there["weights_on"]) == (f"{KIND}:0", [f"{KIND}:0"])
    assert (there["local_rank"], here["local_rank"]) == ("0", "2")
    assert set(there["asked"]) == OTHERS | STREAMS
    assert here["asked"] == {}

    assert there["gradients"].keys() == here["gradients"].keys()
    for name, gradient in here["gradients"].items():
        expected = torch.tensor(gradient)
        apart = (torch.tensor(there["gradients"][name]) - expected).norm() / expected.norm()
        # In bf16 a sum over tiles is rounded tile by tile, and the CPU has one.
        assert apart <= (tolerance if deepspeed_config == "zero0" else 2e-2), (name, float(apart))
    losses = [report["loss"] for report in there["reports"]]
    assert len(losses) == STEPS and losses == sorted(losses, reverse=True), "every step trains"
    for ours, theirs in zip(there["reports"], here["reports"], strict=True):
        for name in ("loss", "step_loss", "grad_norm", "acceptance_length"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name
    assert there["weights"] == pytest.approx(here["weights"], rel=tolerance)

    assert there["order"]["faults"] == []
    assert there["order"]["crossed"] > 20, "work of one stream on what another has written"
    assert len(there["lost"]) == (6 if activation == "offload" else 2)
    for lost, faults in there["lost"].items():
        assert faults, f"a step without {lost} is as good"

    assert set(there["states"]) == set(here["states"]) | {"rng/device"}
    # fp32 weights, their gradients and two moments are what sleeps least.
    assert there["peak"] > there["slept"] > 500_000
    assert there["operations"] > 1_000
    cuda, stream, mixed = there["refused"]
    assert cuda == "train/line.py asks for torch.cuda.is_available"
    assert stream == f"draft/line.py asks for torch.{KIND}.current_stream"
    assert "mixes a tensor of this device with one of cpu" in mixed
