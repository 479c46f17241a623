"""Bytes of what drafts of all algorithms share: a tile of slots in a decoder layer, and a tile of the loss.

Legend: H hidden size, I width of the MLP, K guesses, Vd draft vocabulary.
"""

from __future__ import annotations

from eagle3_ds.costs import FP32, Parts, Setup


def tile_slots(setup: Setup) -> int:
    """Slots of one tile of a layer: what fits `train.tile_bytes` (`slots_per_tile`), but all live slots under
    `activation: keep`, which does not use tiles.
    """
    shape = setup.shape
    if setup.activation == "keep":
        return setup.live_slots
    per_slot = (7 * shape.intermediate_size + 8 * shape.hidden_size) * setup.itemsize
    return min(setup.live_slots, setup.tile_bytes // per_slot)


def norm_entries(setup: Setup) -> int:
    """Bytes per entry of its input that one RMSNorm holds for its backward, its output included."""
    if setup.device == "accelerator":
        return setup.itemsize
    # On CPUs the norm is composed of elementwise operators. They hold the output, the normalised input in
    # fp32 and, in a half dtype, an fp32 copy of the input.
    return setup.itemsize + FP32 * (1 if setup.dtype == "float32" else 2)


def tile_after_attention(setup: Setup) -> int:
    """Bytes of one tile in `after_attention_backward`: the repeated forward and the gradients."""
    shape, item = setup.shape, setup.itemsize
    H, inner = shape.hidden_size, shape.intermediate_size
    if setup.activation == "keep":
        # The gradients of silu(gate) * up, of gate and of up; autograd has kept everything else.
        return tile_slots(setup) * 3 * inner * item
    largest = max(max(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    # A weight gradient in a half dtype is a temporary of the weight's size, which is then added to its fp32
    # sum (`accumulate_product`). It exists when one of the tile's six tensors [t, I] has been freed, so only
    # what exceeds that tensor adds to the peak.
    slots = tile_slots(setup)
    # On CUDA the matmul adds to the sum itself.
    in_place = setup.dtype == "float32" or setup.device == "accelerator"
    product = max(0, (0 if in_place else largest * item) - slots * inner * item)
    return slots * (6 * inner * item + H * (item + norm_entries(setup))) + product


def loss_parts(setup: Setup, columns: int) -> Parts:
    """Bytes of the loss: gradients of the K guesses' hidden states at `columns` slots, the fp32 sum of the
    head's gradient, and one tile of logits.
    """
    shape, item, K = setup.shape, setup.itemsize, setup.ttt_steps
    vocabulary, hidden = shape.draft_vocab_size, shape.hidden_size
    per_row, per_column = (8 + item) * vocabulary, (8 + item + K * item) * vocabulary
    tile_columns = max(1, min(columns, (setup.loss_tile_bytes - (K - 1) * per_row) // (per_row + per_column)))
    half, on_accelerator = setup.dtype != "float32", setup.device == "accelerator"
    # While the guesses' logits are computed: fp32 teacher probabilities of t + K - 1 rows, and the t columns'
    # logits as the matmul returns them and, where no kernel reads those, in fp32.
    wide = FP32 if not (half and on_accelerator) else 0
    logits = (tile_columns + K - 1) * FP32 + tile_columns * (wide + (item if half else 0))
    # Afterwards: the product that goes into dhead, where the matmul cannot add, and the gradient of the norm.
    product = shape.hidden_size * item if half and not on_accelerator else 0
    after = product * vocabulary + K * tile_columns * hidden * item
    # At both times the gradients of the K guesses' logits.
    tile = max(logits * vocabulary, after) + K * tile_columns * vocabulary * item
    # Teacher rows [t, Ht]; the draft's hidden states and their norm [K, t, H].
    tile += tile_columns * shape.target_hidden_size * item
    tile += K * tile_columns * hidden * (item + norm_entries(setup))
    head = vocabulary * hidden
    return {
        "loss gradients": K * columns * shape.hidden_size * item,
        "weight-gradient sums": head * FP32,
        "tile of the loss": tile + K * setup.live_slots * FP32,
    }
