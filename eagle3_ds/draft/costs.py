"""Bytes of what every draft shares: the tiles of an MLP, and the tiles of the loss.

Legend: H hidden size, I width of the MLP, K guesses, Vd draft vocabulary.
"""

from __future__ import annotations

from eagle3_ds.costs import FP32, Parts, Setup


def tile_slots(setup: Setup) -> int:
    """Slots of one tile of a layer; without recomputation all of them."""
    shape = setup.shape
    if setup.activation == "keep":
        return setup.live_slots
    per_slot = (7 * shape.intermediate_size + 8 * shape.hidden_size) * setup.itemsize
    return min(setup.live_slots, setup.tile_bytes // per_slot)


def norm_entries(setup: Setup) -> int:
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
        return tile_slots(setup) * 3 * inner * item
    largest = max(max(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    # A product in a half dtype is rounded before it is added to its fp32 sum, when five of the MLP's width
    # are left of six.
    slots = tile_slots(setup)
    product = max(0, (0 if setup.dtype == "float32" else largest * item) - slots * inner * item)
    return slots * (6 * inner * item + H * (item + norm_entries(setup))) + product


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
    tile += tile_columns * shape.hidden_size * (4 * item + norm_entries(setup))
    return {
        "loss gradients": K * columns * shape.hidden_size * item,
        "weight-gradient sums": head * FP32,
        "tile of the loss": tile + K * setup.live_slots * FP32,
    }
