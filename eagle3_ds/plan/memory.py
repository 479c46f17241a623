"""Bytes of one rank in each phase of an optimizer step, as pure functions of the setup.

Every term is a tensor of the training step that can be named; none is fitted. Only tensors count: no
allocator's rounding, no CUDA context (about 0.5 GiB), no communication library's own buffers.

What the model holds is in states.py, what the sequence holds in activations.py; here they meet, phase by
phase.
"""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_ds.plan.activations import (
    attention_backward,
    backward_sums,
    batch_bytes,
    kept_by_forward,
    kept_in_backward,
    loss_parts,
    offloaded_activations,
    passing_gradients,
    tile_after_attention,
    tile_before_attention,
    weight_sums,
)
from eagle3_ds.plan.setup import Parts, Setup
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
    batch = {"batch": batch_bytes(setup) * setup.accumulation}
    columns = setup.live_slots
    working = {**states, **batch, **gathered_weights(setup), **accumulated_gradient(setup)}
    phases = {
        "rest": states,
        "loss": {**working, **kept_by_forward(setup), **loss_parts(setup, columns)},
        "backward": {**working, **_backward(setup, columns)},
        "reduce": {**working, **_whole_gradients(setup), **gradient_buckets(setup)},
        "update": {**states, **batch, **optimizer_transients(setup)},
    }
    return Memory(phases, {**host, "saved activations": offloaded_activations(setup)})


def _backward(setup: Setup, columns: int) -> Parts:
    """The worst moment of the backward, in the first layer.

    The attention's backward of the last step makes the sums that stay until step 0, while nearly all that was
    saved is there. The tiles of what follows the attention come before it, so that they meet those sums one
    step later.
    """
    through = passing_gradients(setup)
    last = kept_in_backward(setup, columns, steps_done=0)
    sums = backward_sums(setup, steps_done=0)
    moments: list[Parts] = [
        {**last, **sums, "attention's backward": through + attention_backward(setup)},
        {
            **last,
            "weight-gradient sums": weight_sums(setup),
            "tile of the MLP": through + tile_after_attention(setup),
        },
    ]
    if setup.activation != "keep":
        dq_and_q = 2 * setup.live_slots * setup.shape.query_size * setup.itemsize
        moments.append(
            {**last, **sums, "tile of the projections": through + dq_and_q + tile_before_attention(setup)}
        )
    if setup.ttt_steps > 1:
        earlier = {**kept_in_backward(setup, columns, steps_done=1), **backward_sums(setup, steps_done=1)}
        moments.append({**earlier, "tile of the MLP": through + tile_after_attention(setup)})
    if setup.slots > setup.live_slots:
        # Step 0's gradient is as long as the sequence again.
        first = {
            **kept_in_backward(setup, 0, setup.ttt_steps - 1),
            **backward_sums(setup, setup.ttt_steps - 1),
        }
        moments.append(
            {**first, "gradient of all hidden states": setup.slots * setup.shape.hidden_size * setup.itemsize}
        )
    early = gradient_partition(setup) if setup.zero.stage == 2 and head_overflows_bucket(setup) else {}
    worst = max(moments, key=_total)
    return {**worst, "whole gradients": head_gradient(setup), **gradient_buckets(setup), **early}


def _whole_gradients(setup: Setup) -> Parts:
    """Every gradient, and with it the larger of the sums that step 0 hands them out from and of what they are
    reduced into.
    """
    whole = setup.shape.num_parameters * setup.itemsize
    # Sums of the gradients' own dtype are handed out as they are.
    sums = 0 if setup.dtype == "float32" else weight_sums(setup)
    # Stage 0 flattens all of them, and stages 1 and 2 copy out what they own.
    reduced = whole if setup.zero.stage == 0 else gradient_partition(setup).get("gradient partition", 0)
    return {"whole gradients": whole, "their sums or copies": max(sums, reduced)}
