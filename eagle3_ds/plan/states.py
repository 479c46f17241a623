"""Bytes that a rank holds of the model, for any sequence: weights, optimizer state, gradients and buckets, by
ZeRO stage.

Legend: P parameters of the draft, n ranks that ZeRO shards over.
"""

from __future__ import annotations

from eagle3_ds.costs import FP32, Parts, Setup


def model_states(setup: Setup) -> tuple[Parts, Parts]:
    """Bytes of weights, optimizer state and frozen tensors: on the device, and on the host."""
    shape, zero, item = setup.shape, setup.zero, setup.itemsize
    P, n = shape.num_parameters, setup.zero_ranks
    sharded = P // n
    whole = (
        {"weights": P * item}
        if zero.stage < 3
        else {"weights": sharded * item, "weights kept whole": _persistent(setup)}
    )
    owned = P if zero.stage == 0 else sharded
    optimizer = {
        # Without ZeRO an fp32 optimizer updates the weights themselves; ZeRO always updates a flat fp32 copy.
        "fp32 masters": owned * FP32 if zero.stage or setup.dtype != "float32" else 0,
        "Adam moments": 2 * owned * FP32,
        # ZeRO-3 allocates its gradient partition once and keeps it.
        "gradient partition": sharded * item if zero.stage == 3 else 0,
    }
    frozen = {
        "frozen embedding": shape.vocab_size * shape.hidden_size * item,
        "teacher's head": shape.draft_vocab_size * shape.target_hidden_size * item,
        "target beside": setup.target_bytes // setup.world_size,
    }
    # ZeRO-3 also keeps its bucket. Stages 1 and 2 allocate theirs at the first gradient of a backward.
    bucket = {
        "gradient buckets": zero.reduce_bucket * item if zero.stage == 3 and zero.contiguous_gradients else 0
    }
    host: Parts = {}
    if zero.offload_optimizer:
        host, optimizer = optimizer, {}
    if zero.offload_parameters:
        host["weights"] = whole.pop("weights")
    return {**whole, **optimizer, **frozen, **bucket}, host


def _persistent(setup: Setup) -> int:
    """Bytes of the small parameters that ZeRO-3 keeps whole on every rank, beside the shards. With one ZeRO
    rank the shard is everything, so they cost nothing.
    """
    if setup.zero_ranks == 1:
        return 0
    threshold = setup.zero.persistence_threshold
    return sum(size for size in setup.shape.parameter_sizes if size < threshold) * setup.itemsize


def gathered_weights(setup: Setup) -> Parts:
    """Bytes of the gathered weights under ZeRO-3: the draft is one leaf module, so it is gathered whole for
    the forward and for the backward.
    """
    alone = setup.zero_ranks == 1 and not setup.zero.offload_parameters
    if setup.zero.stage < 3 or alone:
        return {}
    return {"gathered weights": setup.shape.num_parameters * setup.itemsize - _persistent(setup)}


def gradient_buckets(setup: Setup) -> Parts:
    """Bytes of the buckets in which stages 1 and 2 collect gradients. With `overlap_comm` there are two: one
    is reduced while the other fills.
    """
    zero = setup.zero
    if zero.stage not in (1, 2) or not zero.contiguous_gradients:
        return {}
    return {"gradient buckets": zero.reduce_bucket * setup.itemsize * (2 if zero.overlap_comm else 1)}


def gradient_partition(setup: Setup) -> Parts:
    """Bytes of the tensor, made at the first reduction, into which stages 1 and 2 copy the gradients that the
    rank owns.
    """
    if setup.zero.stage not in (1, 2):
        return {}
    return {"gradient partition": setup.shape.num_parameters // setup.zero_ranks * setup.itemsize}


def head_overflows_bucket(setup: Setup) -> bool:
    """Whether the first gradients of a backward, those of the head and of the final norm, exceed a bucket.
    DeepSpeed then reduces them at once.
    """
    return (setup.shape.draft_vocab_size + 1) * setup.shape.hidden_size > setup.zero.reduce_bucket


def head_gradient(setup: Setup) -> int:
    """Bytes of the head's gradient, which exists before all others; 0 if a bucket (stage 1 or 2) holds it."""
    zero = setup.zero
    if zero.stage in (1, 2) and zero.contiguous_gradients and not head_overflows_bucket(setup):
        return 0
    return setup.shape.draft_vocab_size * setup.shape.hidden_size * setup.itemsize


def optimizer_transients(setup: Setup) -> Parts:
    """Bytes of the update: gradients in the optimizer's dtype, and two temporaries of AdamW, as large as the
    largest tensor that it updates at once.
    """
    shape, zero = setup.shape, setup.zero
    if zero.offload_optimizer:
        return {}
    P = shape.num_parameters
    if zero.stage == 0:
        gradients = P * setup.itemsize + (P * FP32 if setup.dtype != "float32" else 0)
        return {"gradients": gradients, "AdamW's temporaries": 2 * max(shape.parameter_sizes) * FP32}
    owned = P // setup.zero_ranks
    return {"gradients": owned * FP32, "AdamW's temporaries": 2 * owned * FP32}


def accumulated_gradient(setup: Setup) -> Parts:
    """Bytes of the gradient that earlier micro-batches have left while a later one runs. ZeRO-3 keeps it in
    its gradient partition, which is counted already.
    """
    if setup.accumulation == 1 or setup.zero.stage == 3:
        return {}
    owned = setup.shape.num_parameters // (setup.zero_ranks if setup.zero.stage == 2 else 1)
    return {"accumulated gradient": owned * setup.itemsize}
