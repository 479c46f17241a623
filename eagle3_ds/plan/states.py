"""What a rank holds of the model whatever the sequence: weights, optimizer state, gradients, buckets, by ZeRO
stage.

Legend: P parameters of the draft, n ranks that ZeRO shards over.
"""

from __future__ import annotations

from eagle3_ds.costs import FP32, Parts, Setup


def model_states(setup: Setup) -> tuple[Parts, Parts]:
    """Weights, optimizer state and frozen tensors, on the device and on the host."""
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
        # A plain fp32 optimizer steps the weights themselves; ZeRO always steps a flat copy.
        "fp32 masters": owned * FP32 if zero.stage or setup.dtype != "float32" else 0,
        "Adam moments": 2 * owned * FP32,
        # ZeRO-3's gradient partition is allocated once and stays.
        "gradient partition": sharded * item if zero.stage == 3 else 0,
    }
    frozen = {
        "frozen embedding": shape.vocab_size * shape.hidden_size * item,
        "teacher's head": shape.draft_vocab_size * shape.hidden_size * item,
        "target beside": setup.target_bytes // setup.world_size,
    }
    # ZeRO-3's bucket is allocated once too; that of the lower stages comes with the first gradient of a
    # backward.
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
    """Bytes of the parameters that ZeRO-3 leaves gathered on every rank; alone on its shard, a rank has them
    anyway.
    """
    if setup.zero_ranks == 1:
        return 0
    threshold = setup.zero.persistence_threshold
    return sum(size for size in setup.shape.parameter_sizes if size < threshold) * setup.itemsize


def gathered_weights(setup: Setup) -> Parts:
    """ZeRO-3 gathers the whole draft, one leaf module, for forward and for backward."""
    alone = setup.zero_ranks == 1 and not setup.zero.offload_parameters
    if setup.zero.stage < 3 or alone:
        return {}
    return {"gathered weights": setup.shape.num_parameters * setup.itemsize - _persistent(setup)}


def gradient_buckets(setup: Setup) -> Parts:
    """Where stages 1 and 2 lay gradients side by side; two of them, where one is reduced while the other
    fills.
    """
    zero = setup.zero
    if zero.stage not in (1, 2) or not zero.contiguous_gradients:
        return {}
    return {"gradient buckets": zero.reduce_bucket * setup.itemsize * (2 if zero.overlap_comm else 1)}


def gradient_partition(setup: Setup) -> Parts:
    """What a rank owns of each reduced gradient is copied into a tensor that the first reduction makes."""
    if setup.zero.stage not in (1, 2):
        return {}
    return {"gradient partition": setup.shape.num_parameters // setup.zero_ranks * setup.itemsize}


def head_overflows_bucket(setup: Setup) -> bool:
    """The first gradients of a backward, the head's and the final norm's, are reduced at once when a bucket
    cannot hold them.
    """
    return (setup.shape.draft_vocab_size + 1) * setup.shape.hidden_size > setup.zero.reduce_bucket


def head_gradient(setup: Setup) -> int:
    """The head's is whole before any other; a bucket of stage 1 or 2 that takes it holds it."""
    zero = setup.zero
    if zero.stage in (1, 2) and zero.contiguous_gradients and not head_overflows_bucket(setup):
        return 0
    return setup.shape.draft_vocab_size * setup.shape.hidden_size * setup.itemsize


def optimizer_transients(setup: Setup) -> Parts:
    """Gradients as the optimizer takes them, and AdamW's two temporaries of the tensor that it steps."""
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
    """What earlier micro-batches have left when a later one runs; ZeRO-3 has it in its gradient partition."""
    if setup.accumulation == 1 or setup.zero.stage == 3:
        return {}
    owned = setup.shape.num_parameters // (setup.zero_ranks if setup.zero.stage == 2 else 1)
    return {"accumulated gradient": owned * setup.itemsize}
