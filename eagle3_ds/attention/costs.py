"""The bytes that the USP attention of one unroll holds, and the calls and bytes that it sends.

Legend: S slots of a rank, Q live ones, K TTT steps, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace

from eagle3_ds.costs import FP32, ExchangeName, Parts, Setup, Traffic
from eagle3_ds.kernels import folded
from eagle3_ds.kernels.base import BACKWARD_ROWS
from eagle3_ds.kernels.varlen import backward_rows

SHORT = folded.SHORT
"""Runs of fewer slots are scattered: their query heads are folded."""


def unroll_traffic(setup: Setup) -> list[Traffic]:
    """Calls and bytes of one packed sequence, forward and backward, all layers. An axis of one rank sends
    nothing.
    """
    found = []
    if setup.ulysses > 1:
        found.append(_ulysses(setup))
    if setup.ring > 1:
        found += _gathered(setup) if setup.kv_exchange == "gather" else [_streamed(setup)]
    return found


def _ulysses(setup: Setup) -> Traffic:
    """The all-to-alls, 4 K per layer.

    Forward, 2 K: (q, k, v) of step 0 in one call, q of each later step; (out, lse) of every step.
    Backward, 2 K: (dout, q, lse, delta) of every step; dq of each later step, (dq, dk, dv) of step 0 in one
    call.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    q, statistics = setup.live_slots * shape.query_size * item, setup.live_slots * shape.num_heads * FP32
    kv = setup.slots * 2 * shape.kv_size * item
    forward = (q + kv) + (steps - 1) * q + steps * (q + statistics)
    backward = steps * (2 * q + 2 * statistics) + (steps - 1) * q + (q + kv)
    layers = shape.num_layers
    return Traffic("ulysses", "all_to_all", 4 * steps * layers, (forward + backward) * layers, setup.ulysses)


def _gathered(setup: Setup) -> list[Traffic]:
    """`gather`: one all-gather of keys and values and one reduce-scatter of their fp32 gradients per layer,
    for any K.
    """
    entries = 2 * setup.shape.kv_size // setup.ulysses
    layers = setup.shape.num_layers
    return [
        Traffic("ring", "all_gather", layers, layers * setup.columns * entries * setup.itemsize, setup.ring),
        Traffic("ring", "reduce_scatter", layers, layers * setup.padded_length * entries * FP32, setup.ring),
    ]


def _streamed(setup: Setup) -> Traffic:
    """`ring`: point-to-point messages of blocks (one rank's keys and values) and of their fp32 gradients.

    Forward of step 0 sends ring - 1 blocks. Every other pass, K - 1 forward and K backward, sends the
    `passing` blocks that are not kept. In backward the gradient of a passing block is sent once per hop, the
    last time to its owner; the gradients of kept blocks make one lap of ring - 1 messages after step 0.
    """
    steps, ring, kept = setup.ttt_steps, setup.ring, kept_blocks(setup)
    passing = ring - kept
    blocks = (ring - 1) + (2 * steps - 1) * passing
    gradients = steps * passing + (ring - 1 if kept > 1 else 0)
    entries = setup.columns * 2 * setup.shape.kv_size // setup.ulysses
    layers = setup.shape.num_layers
    payload = layers * entries * (blocks * setup.itemsize + gradients * FP32)
    return Traffic("ring", "send", layers * (blocks + gradients), payload, ring)


def block_bytes(setup: Setup) -> int:
    """Bytes of a block: one ring rank's keys and values for one Ulysses rank's heads, of one layer, with
    their fp32 gradients.
    """
    return setup.columns * 2 * setup.shape.kv_size // setup.ulysses * (setup.itemsize + FP32)


def kept_blocks(setup: Setup) -> int:
    """Blocks that `kv_exchange: ring` holds between the TTT steps in each layer, the rank's own included."""
    return min(setup.ring, 1 + setup.kv_bytes // block_bytes(setup))


def choose_kv_exchange(setup: Setup) -> ExchangeName:
    """What `kv_exchange: auto` means: gather, which sends least, if the other ranks' blocks fit `kv_bytes` in
    each layer; else ring.

    The choice depends on the packing length only, not on a pack, so all ranks make the same for all packs.
    """
    return "gather" if (setup.ring - 1) * block_bytes(setup) <= setup.kv_bytes else "ring"


def keys_and_values(setup: Setup) -> Parts:
    """Bytes of the step-0 keys and values (all of the sequence under `gather`, the kept blocks under `ring`)
    and of the diagonal ones.
    """
    shape, item, layers = setup.shape, setup.itemsize, setup.shape.num_layers
    rows = setup.padded_length if setup.kv_exchange == "gather" else setup.columns * kept_blocks(setup)
    step_0 = layers * rows * 2 * shape.kv_size // setup.ulysses * item
    diagonals = layers * (setup.ttt_steps - 1) * setup.live_slots * 2 * shape.kv_size * item
    return {"step-0 KV": step_0, "diagonal KV": diagonals}


def attention_backward(setup: Setup, is_scattered: bool = False) -> int:
    """Bytes that the backward of one step's attention allocates beside what is kept (`attend_backward`).

    Args:
        is_scattered: whether the live slots are, so that the kernel folds their query heads (`FoldedKernel`).
    """
    shape, S, item = setup.shape, setup.live_slots, setup.itemsize
    query, statistic = S * shape.query_size * item, S * shape.num_heads * FP32
    wide_query = S * shape.query_size * FP32
    total = statistic
    if setup.ttt_steps > 1:
        # The diagonal part of dq, and q, which `recompute` and `offload` make again.
        total += query if setup.activation == "keep" else 2 * query
    if setup.ulysses > 1:
        # dout, q, lse and delta, as they arrive for this rank's heads.
        total += 2 * query + 2 * statistic
    # The kernel's dq in fp32, and the stand-in output that it computes delta from.
    total += wide_query + query
    if not is_scattered:
        return total + _kernel_workspace(setup, *_kernel_block(setup)) + _passing_blocks(setup)
    # Of all rows and heads: dout, q, lse and delta folded, and dq before it is unfolded.
    total += 2 * query + 2 * statistic + wide_query
    group = shape.num_heads // shape.num_kv_heads
    alone = replace(setup, shape=replace(shape, num_heads=shape.num_kv_heads))
    return (
        total
        + _kernel_workspace(alone, folded.JOINED * group, _kernel_block(setup)[1])
        + _passing_blocks(setup)
    )


def gradient_exchange(setup: Setup) -> int:
    """Bytes that the backward of step 0 holds, beside the gradients of the step-0 keys and values, while it
    sums these over the ring in one reduce-scatter (`PrefixKV.take_gradients`); 0 where it does not.

    They matter where most slots are not live: then the keys and values are the largest thing there is.
    """
    if setup.ring == 1 or setup.kv_exchange != "gather":
        return 0
    sums = setup.padded_length * 2 * setup.shape.kv_size // setup.ulysses * FP32
    # The two halves in the order of the ranks, and both joined; then the joined ones and this rank's part of
    # the result. gloo works on a copy of what it sends.
    joined = sums + sums // setup.ring + (sums if setup.device == "cpu" else 0)
    # dq, and, where they came from other ranks, dout and q.
    queries = setup.live_slots * setup.shape.query_size * (3 if setup.ulysses > 1 else 1) * setup.itemsize
    return max(2 * sums, joined) + queries


def _passing_blocks(setup: Setup) -> int:
    """Bytes that `ring` needs in backward: dq summed over the blocks, and the passing blocks with their fp32
    gradients.

    One passing block is computed with. If there is a second one, it is under way meanwhile and takes two
    buffers more, one that sends and one that receives.
    """
    if setup.ring == 1 or setup.kv_exchange == "gather":
        return 0
    passing = setup.ring - kept_blocks(setup)
    copies = 0 if passing == 0 else 1 if passing == 1 else 3
    return setup.live_slots * setup.shape.query_size * FP32 + copies * block_bytes(setup)


def _kernel_workspace(setup: Setup, rows: int, keys: int) -> int:
    """Bytes of what a flash kernel's backward allocates for one block of so many rows and keys: gradients in
    the inputs' dtype, those of keys and values for every query head before they are summed over the group.
    """
    shape, item = setup.shape, setup.itemsize
    query, kv = shape.query_size // setup.ulysses, 2 * shape.kv_size // setup.ulysses
    grouped = shape.num_heads > shape.num_kv_heads
    expanded = keys * 2 * query * item
    gradients = rows * query * item + expanded + keys * kv * FP32
    if setup.device == "cpu":
        return gradients + (expanded if grouped else 0)
    # CUDA kernels also sum dq in fp32, and compute one fp32 statistic (delta) per row and head.
    return gradients + rows * (query + shape.num_heads // setup.ulysses) * FP32


def _kernel_block(setup: Setup) -> tuple[int, int]:
    """Query rows and keys of the largest block that the backward computes, when one document fills the
    sequence.

    On one ring rank all rows are together; on several they come in chunks. The keys are all gathered ones
    under `gather`, and one chunk of a passing block under `ring`.
    """
    if setup.ring == 1:
        rows, keys = setup.live_columns, setup.columns
    else:
        rows = setup.live_columns // setup.chunks_per_rank
        keys = (
            setup.padded_length if setup.kv_exchange == "gather" else setup.columns // setup.chunks_per_rank
        )
    flash = setup.device == "accelerator" and setup.dtype != "float32"
    block = backward_rows(setup.shape.query_size // setup.ulysses) if flash else BACKWARD_ROWS
    if setup.window is not None:
        # A block's own keys and the window before them.
        return min(rows, block), min(keys, min(rows, block) + setup.window)
    return min(rows, block), min(keys, block)
