"""What a draft of EAGLE-3 costs: what its TTT steps keep for backward, what a moment of a step needs beside
it, calls, bytes on the wire and FLOPs.

Legend: S slots of a rank, Q live ones, H hidden size, A = Hq * D entries of a slot's queries, K TTT steps, Vd
draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagle3_ds.algorithms.eagle3.variants import flag, norm_sizes
from eagle3_ds.attention.costs import attention_backward, keys_and_values, unroll_traffic
from eagle3_ds.costs import FP32, INT64, DraftShape, Flops, Parts, SequenceBytes, Setup, Traffic
from eagle3_ds.draft.costs import loss_parts, norm_entries, tile_after_attention, tile_slots
from eagle3_ds.draft.geometry import aux_size


@dataclass(frozen=True)
class Eagle3Shape(DraftShape):
    """Sizes of an EAGLE-3 draft, and what they cost.

    Attributes:
        aux_size: entries of a slot's captured hidden states, which `fc` reads; None: three times the hidden
            size.
        norms_before_fc: entries of each norm of the captured states.
        norm_output: a step's output is normed for the next, which keeps it once more.
    """

    aux_size: int | None = None
    norms_before_fc: tuple[int, ...] = ()
    norm_output: bool = False

    @classmethod
    def of(cls, config: Any) -> Eagle3Shape:
        """From the draft's transformers config (`build_draft_config`)."""
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.draft_vocab_size,
            num_layers=config.num_hidden_layers,
            aux_size=aux_size(config),
            norms_before_fc=norm_sizes(config),
            norm_output=flag(config, "norm_output"),
        )

    def input_size(self, layer: int) -> int:
        """Width of what q, k and v are projected from: the first layer reads the embedding beside the hidden
        state.
        """
        return self.hidden_size * (2 if layer == 0 else 1)

    def layer_weights(self, layer: int) -> dict[str, int]:
        """Parameters of each matrix of a layer."""
        hidden, inner, wide = self.hidden_size, self.intermediate_size, self.input_size(layer)
        return {
            "q": self.query_size * wide,
            "k": self.kv_size * wide,
            "v": self.kv_size * wide,
            "o": hidden * self.query_size,
            "gate": inner * hidden,
            "up": inner * hidden,
            "down": hidden * inner,
        }

    @property
    def fc_size(self) -> int:
        """Parameters of `fc`."""
        return (3 * self.hidden_size if self.aux_size is None else self.aux_size) * self.hidden_size

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor: fc, the layers' matrices and norms, the final norm, the head."""
        hidden = self.hidden_size
        sizes = [*self.norms_before_fc, self.fc_size]
        for layer in range(self.num_layers):
            sizes += [*self.layer_weights(layer).values(), *[hidden] * (3 if layer == 0 else 2)]
        return (*sizes, hidden, self.draft_vocab_size * hidden)

    @property
    def live_slots_alone(self) -> bool:
        """A second layer would make its keys of what the first one gives at every slot."""
        return self.num_layers == 1

    def sequence_bytes(self, setup: Setup) -> SequenceBytes:
        """What a packed sequence makes a rank hold."""
        columns = setup.live_slots
        return SequenceBytes(
            batch=_batch_bytes(setup),
            loss={**_kept_by_forward(setup), **loss_parts(setup, columns)},
            backward=tuple(_backward_moments(setup, columns)),
            weight_sums=_weight_sums(setup),
            offloaded=_offloaded_activations(setup),
        )

    def attention_traffic(self, setup: Setup) -> list[Traffic]:
        """Of one packed sequence, forward and backward, all layers; nothing on an axis with one rank."""
        return unroll_traffic(setup)

    def flops(self, setup: Setup, pairs: int) -> Flops:
        """FLOPs by kind; each Ulysses rank computes its heads' part of the attention."""
        return _step_flops(setup, self, pairs)

    def elementwise_bytes(self, setup: Setup) -> int:
        """Bytes that norms, rotations, activations and the softmax of the loss move."""
        return _elementwise_bytes(setup)


def _offloaded_activations(setup: Setup) -> int:
    """Bytes that `offload` moves to the host for one packed sequence; on a CPU they are there already."""
    if setup.activation != "offload" or setup.device == "cpu":
        return 0
    return setup.ttt_steps * setup.shape.num_layers * sum(_saved_by_step(setup)) + _saved_of_rest(setup)


def _batch_bytes(setup: Setup) -> int:
    """Integers and masks of one packed sequence; hidden states of the target stay on the host and stream
    through tiles.
    """
    # int64: position and teacher token of each slot; bool: supervised, and in the draft vocabulary too, per
    # step.
    return setup.slots * 2 * INT64 + setup.live_slots * 2 * setup.ttt_steps


def _saved_by_step(setup: Setup) -> tuple[int, int]:
    """What one layer keeps of one step for backward: up to the attention's output, and after it.

    `recompute` keeps the hidden state and the attention's output; the rest is what autograd keeps of
    the functions in draft/decoder.py and layer.py. Without statistics.
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


def _kept_by_forward(setup: Setup) -> Parts:
    """What is kept when the last step is through."""
    K, layers = setup.ttt_steps, setup.shape.num_layers
    hidden = setup.live_slots * setup.shape.hidden_size * setup.itemsize
    saved = K * layers * sum(_saved_by_step(setup)) + _saved_of_rest(setup)
    if _offloaded_activations(setup):
        # The loss reads the K outputs of the last layer before they may go; one step's tensors are on their
        # way.
        saved = K * hidden + sum(_saved_by_step(setup))
    # The last output is nobody's input, but the loss reads it.
    saved += hidden + _kept_for_norms(setup, K - 1)
    return {"saved activations": saved + _statistics(setup), **keys_and_values(setup)}


def _kept_for_norms(setup: Setup, count: int) -> int:
    """Outputs of `count` steps before the norm that the next step reads them behind, where there is one."""
    assert isinstance(setup.shape, Eagle3Shape)
    kept = setup.live_slots * setup.shape.hidden_size * setup.itemsize
    return count * kept if setup.shape.norm_output else 0


def _weight_sums(setup: Setup) -> int:
    """The layers' weight gradients, summed over the steps in fp32, or by autograd in the weights' own
    dtype.
    """
    shape = setup.shape
    weights = sum(sum(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    return weights * (setup.itemsize if setup.activation == "keep" else FP32)


def _kept_in_backward(setup: Setup, columns: int, steps_done: int) -> Parts:
    """What is still kept in the first layer's backward, when `steps_done` steps are behind it."""
    shape, layers = setup.shape, setup.shape.num_layers
    steps = setup.ttt_steps - steps_done
    before, after = _saved_by_step(setup)
    # The later layers of this step are through, and what autograd kept after this layer's attention is used
    # up.
    saved = (
        steps * layers * (before + after) - (layers - 1) * (before + after) - after + _saved_of_rest(setup)
    )
    if _offloaded_activations(setup):
        saved = 2 * (before + after)
    saved += _kept_for_norms(setup, steps - 1)
    return {
        "saved activations": saved + _statistics(setup),
        **keys_and_values(setup),
        # This step's has been added to the hidden state's gradient.
        "loss gradients": (steps - 1) * columns * shape.hidden_size * setup.itemsize,
    }


def _backward_sums(setup: Setup, steps_done: int) -> Parts:
    """Gradients of keys and values (step 0's in fp32; the diagonals' of the steps behind are used), and of
    the weights.
    """
    kv = keys_and_values(setup)
    step_0 = kv["step-0 KV"] // setup.itemsize * FP32
    diagonals = kv["diagonal KV"] * (setup.ttt_steps - 1 - steps_done) // max(1, setup.ttt_steps - 1)
    return {"KV gradients": step_0 + diagonals, "weight-gradient sums": _weight_sums(setup)}


def _passing_gradients(setup: Setup) -> int:
    """Gradients that pass through a layer's backward: of its output, of its input, of the attention's
    output.
    """
    shape = setup.shape
    hidden = 1 if setup.activation == "keep" else 2
    return setup.live_slots * (hidden * shape.hidden_size + shape.query_size) * setup.itemsize


def _tile_before_attention(setup: Setup) -> int:
    """The tile of what precedes the attention: norms repeated, gradients of the projections turned back and
    multiplied.
    """
    shape, item = setup.shape, setup.itemsize
    turned = shape.query_size + shape.kv_size
    # The embedding, both norms side by side and the gradient of that, and one norm's backward.
    norm_backward = item if setup.device == "cuda" else 3 * FP32
    return tile_slots(setup) * (
        turned * item + shape.hidden_size * (5 * item + 2 * norm_entries(setup) + norm_backward)
    )


def _backward_moments(setup: Setup, columns: int) -> list[Parts]:
    """Moments of the backward that may be the worst, all in the first layer.

    The attention's backward of the last step makes the sums that stay until step 0, while nearly all that was
    saved is there. The tiles of what follows the attention come before it, so that they meet those sums one
    step later.
    """
    through = _passing_gradients(setup)
    last = _kept_in_backward(setup, columns, steps_done=0)
    sums = _backward_sums(setup, steps_done=0)
    moments: list[Parts] = [
        {**last, **sums, "attention's backward": through + attention_backward(setup)},
        {
            **last,
            "weight-gradient sums": _weight_sums(setup),
            "tile of the MLP": through + tile_after_attention(setup),
        },
    ]
    if setup.activation != "keep":
        dq_and_q = 2 * setup.live_slots * setup.shape.query_size * setup.itemsize
        moments.append(
            {**last, **sums, "tile of the projections": through + dq_and_q + _tile_before_attention(setup)}
        )
    if setup.ttt_steps > 1:
        earlier = {**_kept_in_backward(setup, columns, steps_done=1), **_backward_sums(setup, steps_done=1)}
        moments.append({**earlier, "tile of the MLP": through + tile_after_attention(setup)})
    if setup.slots > setup.live_slots:
        # Step 0's gradient is as long as the sequence again.
        first = {
            **_kept_in_backward(setup, 0, setup.ttt_steps - 1),
            **_backward_sums(setup, setup.ttt_steps - 1),
        }
        moments.append(
            {**first, "gradient of all hidden states": setup.slots * setup.shape.hidden_size * setup.itemsize}
        )
    return moments


def _step_flops(setup: Setup, shape: Eagle3Shape, pairs: int) -> Flops:
    """FLOPs by kind. `pairs` are those of the attention; each Ulysses rank computes its heads' part of
    them.
    """
    slots, steps = setup.live_slots, setup.ttt_steps
    fc = shape.fc_size
    layers = [shape.layer_weights(layer) for layer in range(shape.num_layers)]
    # Forward once, backward twice; fc has constant inputs, so no gradient of them. The rest has keys and
    # values alone.
    rest = (setup.slots - slots) * 3 * sum(layers[0][name] for name in ("k", "v"))
    matmul = 2 * (
        setup.slots * 2 * fc + rest + slots * 3 * steps * sum(sum(weights.values()) for weights in layers)
    )
    recompute = 0
    if setup.activation != "keep":
        # Keys, values and the attention's output are kept, and nothing in backward needs the output of
        # `down`.
        recompute = (
            2 * slots * steps * sum(weights[name] for weights in layers for name in ("q", "o", "gate", "up"))
        )
    attention = 2 * pairs * shape.query_size // setup.ulysses * steps * shape.num_layers
    head = 2 * slots * shape.hidden_size * shape.draft_vocab_size
    return Flops(
        layers=matmul,
        recompute=recompute,
        # Two products forward; in backward the scores again, and four more.
        attention_forward=2 * attention,
        attention_backward=5 * attention,
        # The teacher's logits once, and of each step the student's and two gradients.
        loss=head * (1 + 3 * steps),
    )


def _elementwise_bytes(setup: Setup) -> int:
    """Bytes that norms, rotations, activations and the softmax of the loss move, one rank, one packed
    sequence.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    wide = 10 * shape.hidden_size + 4 * (shape.query_size + 2 * shape.kv_size) + 6 * shape.intermediate_size
    passes = 3 if setup.activation == "keep" else 4
    # k diagonals, of keys and of values, are read at step k, once forward and twice backward.
    diagonals = 3 * 2 * shape.kv_size * steps * (steps - 1) // 2
    softmax = 8 * shape.draft_vocab_size * FP32 * (steps + 1)
    return setup.live_slots * (shape.num_layers * item * (steps * passes * wide + diagonals) + softmax)
