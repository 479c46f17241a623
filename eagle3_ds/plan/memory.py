"""Bytes of one rank in each phase of an optimizer step, as pure functions of the setup.

Every term is a tensor of the training step that can be named; none is fitted. Only tensors count: no
allocator's rounding, no CUDA context (about 0.5 GiB), no communication library's own buffers.

What the model holds is in states.py, what a sequence makes it hold is the draft's to say; here they meet,
phase by phase.
"""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_ds.costs import Parts, SequenceBytes, Setup
from eagle3_ds.plan.states import (
    accumulated_gradient,
    gathered_weights,
    gradient_buckets,
    gradient_partition,
    head_gradient,
    head_overflows_bucket,
    model_states,
    optimizer_transients,
)


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one rank.

    Attributes:
        phases: what is alive on the device at the worst moment of each phase, part by part: at `rest` between
            two steps, in the `loss`, in `backward`, when it ends and gradients are reduced (`reduce`), and in
            the optimizer's `update`.
        host: what the offload modes keep in host memory.
    """

    phases: dict[str, Parts]
    host: Parts

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: _total(self.phases[phase]))

    @property
    def at_peak(self) -> Parts:
        return self.phases[self.phase]

    @property
    def peak(self) -> int:
        return _total(self.at_peak)

    @property
    def states(self) -> int:
        """What is alive between two steps."""
        return _total(self.phases["rest"])


def _total(parts: Parts) -> int:
    return sum(parts.values())


def predict_memory(setup: Setup) -> Memory:
    """Bytes per rank."""
    states, host = model_states(setup)
    sequence = setup.shape.sequence_bytes(setup)
    batch = {"batch": sequence.batch * setup.accumulation}
    working = {**states, **batch, **gathered_weights(setup), **accumulated_gradient(setup)}
    phases = {
        "rest": states,
        "loss": {**working, **sequence.loss},
        "backward": {**working, **_backward(setup, sequence)},
        "reduce": {**working, **_whole_gradients(setup, sequence), **gradient_buckets(setup)},
        "update": {**states, **batch, **optimizer_transients(setup)},
    }
    return Memory(phases, {**host, "saved activations": sequence.offloaded})


def _backward(setup: Setup, sequence: SequenceBytes) -> Parts:
    """The worst moment of the backward, and the gradients that are whole by then."""
    early = gradient_partition(setup) if setup.zero.stage == 2 and head_overflows_bucket(setup) else {}
    worst = max(sequence.backward, key=_total)
    return {**worst, "whole gradients": head_gradient(setup), **gradient_buckets(setup), **early}


def _whole_gradients(setup: Setup, sequence: SequenceBytes) -> Parts:
    """Every gradient, and with it the larger of the sums that it is handed out from and of what it is reduced
    into.
    """
    whole = setup.shape.num_parameters * setup.itemsize
    # Sums of the gradients' own dtype are handed out as they are.
    sums = 0 if setup.dtype == "float32" else sequence.weight_sums
    # Stage 0 flattens all of them, and stages 1 and 2 copy out what they own.
    reduced = whole if setup.zero.stage == 0 else gradient_partition(setup).get("gradient partition", 0)
    return {"whole gradients": whole, "their sums or copies": max(sums, reduced)}
