"""What the USP attention of one unroll holds and sends: bytes and calls, beside the tensors that they count.

Legend: S slots of a rank, Q live ones, K TTT steps, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from eagle3_ds.costs import FP32, ExchangeName, Parts, Setup, Traffic

BACKWARD_BLOCK = 2**12
"""`TileKernel.backward_block`: rows, and about as many keys, of one call of an attention kernel's backward.
"""


def unroll_traffic(setup: Setup) -> list[Traffic]:
    """Of one packed sequence, forward and backward, all layers; nothing on an axis with one rank."""
    found = []
    if setup.ulysses > 1:
        found.append(_ulysses(setup))
    if setup.ring > 1:
        found += _gathered(setup) if setup.kv_exchange == "gather" else [_streamed(setup)]
    return found


def _ulysses(setup: Setup) -> Traffic:
    """Forward: q, k and v of step 0 in one call, q of each later step, (out, lse) of every step.

    Backward: (dout, q, lse, delta) of every step, dq of each later step, dq, dk and dv of step 0 in one call.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    q, statistics = setup.live_slots * shape.query_size * item, setup.live_slots * shape.num_heads * FP32
    kv = setup.slots * 2 * shape.kv_size * item
    forward = (q + kv) + (steps - 1) * q + steps * (q + statistics)
    backward = steps * (2 * q + 2 * statistics) + (steps - 1) * q + (q + kv)
    layers = shape.num_layers
    return Traffic("ulysses", "all_to_all", 4 * steps * layers, (forward + backward) * layers, setup.ulysses)


def _gathered(setup: Setup) -> list[Traffic]:
    """Keys and values once, their gradients once in fp32, whatever K."""
    entries = 2 * setup.shape.kv_size // setup.ulysses
    layers = setup.shape.num_layers
    return [
        Traffic("ring", "all_gather", layers, layers * setup.columns * entries * setup.itemsize, setup.ring),
        Traffic("ring", "reduce_scatter", layers, layers * setup.padded_length * entries * FP32, setup.ring),
    ]


def _streamed(setup: Setup) -> Traffic:
    """Blocks of keys and values pass round; those of the first hops are kept after step 0, the others pass in
    every step.

    In backward the gradients of passing blocks follow them, the last hop being home, and those of kept blocks
    make one lap at the end, several in one message where they have one owner. Gradients are fp32.
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
    """One ring rank's keys and values for one Ulysses rank's heads, one layer, with their fp32 gradients."""
    return setup.columns * 2 * setup.shape.kv_size // setup.ulysses * (setup.itemsize + FP32)


def kept_blocks(setup: Setup) -> int:
    """Blocks that `kv_exchange: ring` holds between the TTT steps in each layer, a rank's own among them."""
    return min(setup.ring, 1 + setup.kv_bytes // block_bytes(setup))


def choose_kv_exchange(setup: Setup) -> ExchangeName:
    """What `kv_exchange: auto` means: gather, which sends least, unless what other ranks contribute exceeds
    `kv_bytes` a layer.

    The same on all ranks and for all packs, because it depends on the packing length and not on a pack.
    """
    return "gather" if (setup.ring - 1) * block_bytes(setup) <= setup.kv_bytes else "ring"


def keys_and_values(setup: Setup) -> Parts:
    """Step 0's, gathered or this ring rank's own with the kept blocks, and the diagonals of the later
    steps.
    """
    shape, item, layers = setup.shape, setup.itemsize, setup.shape.num_layers
    rows = setup.padded_length if setup.kv_exchange == "gather" else setup.columns * kept_blocks(setup)
    step_0 = layers * rows * 2 * shape.kv_size // setup.ulysses * item
    diagonals = layers * (setup.ttt_steps - 1) * setup.live_slots * 2 * shape.kv_size * item
    return {"step-0 KV": step_0, "diagonal KV": diagonals}


def attention_backward(setup: Setup) -> int:
    shape, S, item = setup.shape, setup.live_slots, setup.itemsize
    query, statistic = S * shape.query_size * item, S * shape.num_heads * FP32
    wide_query = S * shape.query_size * FP32
    total = statistic
    if setup.ttt_steps > 1:
        # The diagonals' part of q's gradient, and q again where it was not kept.
        total += query if setup.activation == "keep" else 2 * query
    if setup.ulysses > 1:
        # dout, q and two statistics in heads layout.
        total += 2 * query + 2 * statistic
    # The kernel's dq in fp32, and the output that it computes delta from.
    total += wide_query + query
    return total + _kernel_workspace(setup) + _passing_blocks(setup)


def _passing_blocks(setup: Setup) -> int:
    """Of the ring strategy: dq summed over the blocks, and the blocks that pass with their fp32 gradients.

    Each is here once, and where another follows, that one is on its way: as it was sent and as it arrives.
    """
    if setup.ring == 1 or setup.kv_exchange == "gather":
        return 0
    passing = setup.ring - kept_blocks(setup)
    copies = 0 if passing == 0 else 1 if passing == 1 else 3
    return setup.live_slots * setup.shape.query_size * FP32 + copies * block_bytes(setup)


def _kernel_workspace(setup: Setup) -> int:
    """What a flash kernel's backward makes for one block: gradients in the input's dtype, those of keys for
    every query head.
    """
    shape, item = setup.shape, setup.itemsize
    rows, keys = _kernel_block(setup)
    query, kv = shape.query_size // setup.ulysses, 2 * shape.kv_size // setup.ulysses
    grouped = shape.num_heads > shape.num_kv_heads
    expanded = keys * 2 * query * item
    gradients = rows * query * item + expanded + keys * kv * FP32
    if setup.device == "cpu":
        return gradients + (expanded if grouped else 0)
    # dq is accumulated in fp32, and a row has a statistic more.
    return gradients + rows * (query + shape.num_heads // setup.ulysses) * FP32


def _kernel_block(setup: Setup) -> tuple[int, int]:
    """Query rows and keys of the largest block for one document, whose rows are together on one ring rank,
    else in chunks.

    They meet all keys before them where those are gathered, else a chunk of a streamed block at a time.
    """
    if setup.ring == 1:
        rows, keys = setup.live_columns, setup.columns
    else:
        rows = setup.live_columns // setup.chunks_per_rank
        keys = (
            setup.padded_length if setup.kv_exchange == "gather" else setup.columns // setup.chunks_per_rank
        )
    if setup.window is not None:
        # A block's rows and the window before them.
        return min(rows, BACKWARD_BLOCK), min(keys, min(rows, BACKWARD_BLOCK) + setup.window)
    return min(rows, BACKWARD_BLOCK), min(keys, BACKWARD_BLOCK)
