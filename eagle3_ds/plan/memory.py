"""Bytes of one rank in each phase of an optimizer step, as pure functions of the setup.

Every term is a tensor of the training step; none is fitted to measurements. Only tensors count: not the
allocator's rounding, not the CUDA context (about 0.5 GiB), not the buffers of a communication library.

states.py has the bytes of the model, the draft's shape those of a packed sequence; this module adds them,
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
        phases: bytes on the device at the worst moment of each phase, by part. The phases are `rest` (between
            two steps), `loss`, `backward`, `reduce` (the end of backward, when gradients are reduced),
            `update` (of the optimizer), and on rank 0 `decoding` (between two steps) with `eval.during`.
        host: bytes that the offload modes keep in host memory, by part.
    """

    phases: dict[str, Parts]
    host: Parts

    @property
    def phase(self) -> str:
        """The name of the phase that needs most."""
        return max(self.phases, key=lambda phase: _total(self.phases[phase]))

    @property
    def at_peak(self) -> Parts:
        """Bytes by part in that phase."""
        return self.phases[self.phase]

    @property
    def peak(self) -> int:
        """Bytes in that phase."""
        return _total(self.at_peak)

    @property
    def states(self) -> int:
        """Bytes between two steps."""
        return _total(self.phases["rest"])


def _total(parts: Parts) -> int:
    return sum(parts.values())


def predict_memory(setup: Setup) -> Memory:
    """Predict the bytes of one rank in each phase."""
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
    if setup.decoder_bytes:
        served = {"decoding target": setup.decoder_bytes, "decoding draft": setup.decoder_draft_bytes}
        phases["decoding"] = {**states, **served}
        # The target waits there between two decodings.
        host = {**host, "decoding target (rank 0)": setup.decoder_bytes}
    return Memory(phases, {**host, "saved activations": sequence.offloaded})


def _backward(setup: Setup, sequence: SequenceBytes) -> Parts:
    """The worst moment of the backward, with the gradients and buckets that exist by then."""
    early = gradient_partition(setup) if setup.zero.stage == 2 and head_overflows_bucket(setup) else {}
    worst = max(sequence.backward, key=_total)
    return {**worst, "whole gradients": head_gradient(setup), **gradient_buckets(setup), **early}


def _whole_gradients(setup: Setup, sequence: SequenceBytes) -> Parts:
    """All gradients, and the larger of two things that never exist together: the fp32 sums that they are
    rounded from, and the copies that they are reduced in.
    """
    whole = setup.shape.num_parameters * setup.itemsize
    # In an fp32 run the sums become the gradients without a copy.
    sums = 0 if setup.dtype == "float32" else sequence.weight_sums
    # Stage 0 copies all gradients into a flat tensor; stages 1 and 2 copy the partition that the rank owns.
    reduced = whole if setup.zero.stage == 0 else gradient_partition(setup).get("gradient partition", 0)
    return {"whole gradients": whole, "their sums or copies": max(sums, reduced)}
