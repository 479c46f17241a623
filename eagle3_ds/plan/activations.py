"""What the TTT steps keep for backward, and what a moment of the step needs beside it.

Legend: S slots of a rank, Q live ones, H hidden size, A = Hq * D entries of a slot's queries, K TTT steps, Vd
draft vocabulary.
"""

from __future__ import annotations

from eagle3_ds.plan.communication import block_bytes, kept_blocks
from eagle3_ds.plan.setup import FP32, INT64, Parts, Setup

BACKWARD_BLOCK = 2**12
"""`TileKernel.backward_block`: rows, and about as many keys, of one call of an attention kernel's backward.
"""


def offloaded_activations(setup: Setup) -> int:
    """Bytes that `offload` moves to the host for one packed sequence; on a CPU they are there already."""
    if setup.activation != "offload" or setup.device == "cpu":
        return 0
    return setup.ttt_steps * setup.shape.num_layers * sum(_saved_by_step(setup)) + _saved_of_rest(setup)


def batch_bytes(setup: Setup) -> int:
    """Integers and masks of one packed sequence; hidden states of the target stay on the host and stream
    through tiles.
    """
    # int64: position and teacher token of each slot; bool: supervised, and in the draft vocabulary too, per
    # step.
    return setup.slots * 2 * INT64 + setup.live_slots * 2 * setup.ttt_steps


def _saved_by_step(setup: Setup) -> tuple[int, int]:
    """What one layer keeps of one step for backward: up to the attention's output, and after it.

    `recompute` keeps the hidden state and the attention's output; the rest is what autograd keeps of
    the functions in model/decoder.py. Without statistics.
    """
    shape, S, item = setup.shape, setup.live_slots, setup.itemsize
    H, A, inner = shape.hidden_size, shape.query_size, shape.intermediate_size
    if setup.activation != "keep":
        return S * (H + A) * item, 0
    # Norms beside each other and q feed matmuls and the attention; the angles are fp32.
    before = S * ((2 * H + 2 * A) * item + 2 * shape.head_dim * FP32)
    # The norm's output, gate, up, silu(gate) and their product.
    after = S * (H + 4 * inner) * item
    if setup.device == "cuda":
        # A fused norm keeps its input: the embedding and the hidden state, and the hidden state after the
        # attention.
        return before + 2 * S * H * item, after + S * H * item
    # Composed of elementwise operators it keeps, in fp32, its input (the embedding's has no gradient) and the
    # normalised one.
    return before + 3 * S * H * FP32, after + 2 * S * H * FP32


def _saved_of_rest(setup: Setup) -> int:
    """What step 0 keeps of the slots that are not live: their hidden states, in the one layer that there is
    then.
    """
    shape, rest, item = setup.shape, setup.slots - setup.live_slots, setup.itemsize
    H = shape.hidden_size
    if setup.activation != "keep":
        return rest * H * item
    norms = 2 * H * item if setup.device == "cuda" else 3 * H * FP32
    return rest * (2 * H * item + norms + 2 * shape.head_dim * FP32)


def _statistics(setup: Setup) -> int:
    """Of all steps: log-sum-exps, and the indices of tokens and positions."""
    rest = (setup.slots - setup.live_slots) * 2 * INT64
    return (
        setup.ttt_steps
        * setup.live_slots
        * (setup.shape.num_layers * setup.shape.num_heads * FP32 + 2 * INT64)
        + rest
    )


def kept_by_forward(setup: Setup) -> Parts:
    """What is kept when the last step is through."""
    K, layers = setup.ttt_steps, setup.shape.num_layers
    hidden = setup.live_slots * setup.shape.hidden_size * setup.itemsize
    saved = K * layers * sum(_saved_by_step(setup)) + _saved_of_rest(setup)
    if offloaded_activations(setup):
        # The loss reads the K outputs of the last layer before they may go; one step's tensors are on their
        # way.
        saved = K * hidden + sum(_saved_by_step(setup))
    # The last output is nobody's input, but the loss reads it.
    return {"saved activations": saved + hidden + _statistics(setup), **_keys_and_values(setup)}


def _keys_and_values(setup: Setup) -> Parts:
    """Step 0's, gathered or this ring rank's own with the kept blocks, and the diagonals of the later steps."""
    shape, item, layers = setup.shape, setup.itemsize, setup.shape.num_layers
    rows = setup.padded_length if setup.kv_exchange == "gather" else setup.columns * kept_blocks(setup)
    step_0 = layers * rows * 2 * shape.kv_size // setup.ulysses * item
    diagonals = layers * (setup.ttt_steps - 1) * setup.live_slots * 2 * shape.kv_size * item
    return {"step-0 KV": step_0, "diagonal KV": diagonals}


def weight_sums(setup: Setup) -> int:
    """The layers' weight gradients, summed over the steps in fp32, or by autograd in the weights' own dtype."""
    shape = setup.shape
    weights = sum(sum(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    return weights * (setup.itemsize if setup.activation == "keep" else FP32)


def kept_in_backward(setup: Setup, columns: int, steps_done: int) -> Parts:
    """What is still kept in the first layer's backward, when `steps_done` steps are behind it."""
    shape, layers = setup.shape, setup.shape.num_layers
    steps = setup.ttt_steps - steps_done
    before, after = _saved_by_step(setup)
    # The later layers of this step are through, and what autograd kept after this layer's attention is used
    # up.
    saved = (
        steps * layers * (before + after) - (layers - 1) * (before + after) - after + _saved_of_rest(setup)
    )
    if offloaded_activations(setup):
        saved = 2 * (before + after)
    return {
        "saved activations": saved + _statistics(setup),
        **_keys_and_values(setup),
        # This step's has been added to the hidden state's gradient.
        "loss gradients": (steps - 1) * columns * shape.hidden_size * setup.itemsize,
    }


def backward_sums(setup: Setup, steps_done: int) -> Parts:
    """Gradients of keys and values (step 0's in fp32; the diagonals' of the steps behind are used), and of
    the weights.
    """
    kv = _keys_and_values(setup)
    step_0 = kv["step-0 KV"] // setup.itemsize * FP32
    diagonals = kv["diagonal KV"] * (setup.ttt_steps - 1 - steps_done) // max(1, setup.ttt_steps - 1)
    return {"KV gradients": step_0 + diagonals, "weight-gradient sums": weight_sums(setup)}


def passing_gradients(setup: Setup) -> int:
    """Gradients that pass through a layer's backward: of its output, of its input, of the attention's output."""
    shape = setup.shape
    hidden = 1 if setup.activation == "keep" else 2
    return setup.live_slots * (hidden * shape.hidden_size + shape.query_size) * setup.itemsize


def _tile_slots(setup: Setup) -> int:
    """Slots of one tile of a layer; without recomputation all of them."""
    shape = setup.shape
    if setup.activation == "keep":
        return setup.live_slots
    per_slot = (7 * shape.intermediate_size + 8 * shape.hidden_size) * setup.itemsize
    return min(setup.live_slots, setup.tile_bytes // per_slot)


def _norm(setup: Setup) -> int:
    """Entries of the hidden size, in the training dtype's bytes, that one norm holds for its backward, its
    output included.
    """
    if setup.device == "cuda":
        return setup.itemsize
    # Composed: the normalised input in fp32, beside a copy of the input where that is of another dtype.
    return setup.itemsize + FP32 * (1 if setup.dtype == "float32" else 2)


def tile_after_attention(setup: Setup) -> int:
    """The tile of what follows the attention: repeated up to gate and up, and its gradients."""
    shape, item = setup.shape, setup.itemsize
    H, inner = shape.hidden_size, shape.intermediate_size
    if setup.activation == "keep":
        # Of the MLP's product: the gradients of it, of gate and of up; autograd has kept the rest.
        return _tile_slots(setup) * 3 * inner * item
    largest = max(max(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    # A product in a half dtype is rounded before it is added to its fp32 sum, when five of the MLP's width
    # are left of six.
    slots = _tile_slots(setup)
    product = max(0, (0 if setup.dtype == "float32" else largest * item) - slots * inner * item)
    return slots * (6 * inner * item + H * (item + _norm(setup))) + product


def tile_before_attention(setup: Setup) -> int:
    """The tile of what precedes the attention: norms repeated, gradients of the projections turned back and
    multiplied.
    """
    shape, item = setup.shape, setup.itemsize
    turned = shape.query_size + shape.kv_size
    # The embedding, both norms side by side and the gradient of that, and one norm's backward.
    norm_backward = item if setup.device == "cuda" else 3 * FP32
    return _tile_slots(setup) * (
        turned * item + shape.hidden_size * (5 * item + 2 * _norm(setup) + norm_backward)
    )


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


def loss_parts(setup: Setup, columns: int) -> Parts:
    """Gradients at the K steps' outputs, the head's in fp32, and one tile of logits."""
    shape, item, K = setup.shape, setup.itemsize, setup.ttt_steps
    per_row, per_column = (8 + item) * shape.draft_vocab_size, (12 + item) * shape.draft_vocab_size
    tile_columns = max(1, min(columns, (setup.loss_tile_bytes - (K - 1) * per_row) // (per_row + per_column)))
    # Alive at a time: teacher probabilities of the rows, logits of the columns, and their gradient in the
    # head's dtype.
    tile = (2 * tile_columns + K - 1) * shape.draft_vocab_size * FP32
    head = shape.draft_vocab_size * shape.hidden_size
    if setup.dtype != "float32":
        tile += tile_columns * shape.draft_vocab_size * item + head * item
    # The tile's rows of the teacher, its columns of a student, their norm and their gradient.
    tile += tile_columns * shape.hidden_size * (4 * item + _norm(setup))
    return {
        "loss gradients": K * columns * shape.hidden_size * item,
        "weight-gradient sums": head * FP32,
        "tile of the loss": tile + K * setup.live_slots * FP32,
    }
