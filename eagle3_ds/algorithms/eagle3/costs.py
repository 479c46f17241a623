"""The costs of an EAGLE-3 draft: what its TTT steps keep for backward, the temporary memory of a step, calls,
bytes sent and FLOPs.

Legend: S slots of a rank, Q live ones, H hidden size, A = Hq * D entries of a slot's queries, K TTT steps, Vd
draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from eagle3_ds.algorithms.eagle3.variants import flag, norm_sizes
from eagle3_ds.attention.costs import (
    attention_backward,
    gradient_exchange,
    keys_and_values,
    unroll_traffic,
)
from eagle3_ds.attention.rotary import rotated_channels
from eagle3_ds.costs import FP32, INT64, DraftShape, Flops, Parts, SequenceBytes, Setup, Traffic
from eagle3_ds.draft.costs import loss_parts, norm_entries, tile_after_attention, tile_slots
from eagle3_ds.draft.geometry import aux_size, has_own_embedding, target_hidden_size

ShapeT = TypeVar("ShapeT", bound="Eagle3Shape")


@dataclass(frozen=True)
class Eagle3Shape(DraftShape):
    """Sizes of an EAGLE-3 draft, and its costs.

    Attributes:
        aux_size: entries of a slot's captured hidden states, which `fc` reads; None for three times the
            hidden size.
        norms_before_fc: entries of each norm of the captured states.
        norm_output: whether the next step reads the norm of a step's output; the output is then kept as the
            input of that norm.
    """

    aux_size: int | None = None
    norms_before_fc: tuple[int, ...] = ()
    norm_output: bool = False

    @classmethod
    def of(cls: type[ShapeT], config: Any) -> ShapeT:
        """From the draft's transformers config (`build_draft_config`)."""
        rotated = rotated_channels(config)
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
            target_size=target_hidden_size(config) if has_own_embedding(config) else None,
            rotated_size=None if rotated == config.head_dim else rotated,
            norms_before_fc=norm_sizes(config),
            norm_output=flag(config, "norm_output"),
        )

    def input_size(self, layer: int) -> int:
        """Entries of what q, k and v are projected from: the first layer concatenates the embedding and the
        hidden state.
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
    def projected_once(self) -> int:
        """Parameters of those matrices of the first layer that steps after the first do not run through."""
        return 0

    def kept_less(self, setup: Setup) -> int:
        """Bytes by which a step after the first keeps less than the first one, in the first layer."""
        return 0

    @property
    def fc_size(self) -> int:
        """Parameters of `fc`."""
        return (3 * self.hidden_size if self.aux_size is None else self.aux_size) * self.hidden_size

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor: norms before fc, fc, layers, final norm, head."""
        hidden = self.hidden_size
        sizes = [*self.norms_before_fc, self.fc_size]
        for layer in range(self.num_layers):
            sizes += [*self.layer_weights(layer).values(), *[hidden] * (3 if layer == 0 else 2)]
        return (*sizes, hidden, self.draft_vocab_size * hidden)

    @property
    def live_slots_alone(self) -> bool:
        """True for one layer. A second layer would need the first one's output at every slot for its keys."""
        return self.num_layers == 1

    def sequence_bytes(self, setup: Setup) -> SequenceBytes:
        """Bytes that one packed sequence makes a rank hold."""
        columns = setup.live_slots
        return SequenceBytes(
            batch=_batch_bytes(setup),
            loss={**_kept_by_forward(setup), **loss_parts(setup, columns)},
            backward=tuple(_backward_moments(setup, columns)),
            weight_sums=_weight_sums(setup),
            offloaded=_offloaded_activations(setup),
        )

    def attention_traffic(self, setup: Setup) -> list[Traffic]:
        """Calls and bytes of one packed sequence, forward and backward, all layers; none on an axis of one
        rank.
        """
        return unroll_traffic(setup)

    def flops(self, setup: Setup, pairs: int) -> Flops:
        """FLOPs of one rank for one packed sequence. `pairs` are those of a ring rank; each of its Ulysses
        ranks computes them for its heads.
        """
        return _step_flops(setup, self, pairs)

    def elementwise_bytes(self, setup: Setup) -> int:
        """Bytes that elementwise work reads and writes."""
        return _elementwise_bytes(setup)


def _offloaded_activations(setup: Setup) -> int:
    """Bytes that `offload` moves to the host for one packed sequence; none on a CPU."""
    if setup.activation != "offload" or setup.device == "cpu":
        return 0
    steps = setup.ttt_steps * setup.shape.num_layers * sum(_saved_by_step(setup))
    return steps - (setup.ttt_steps - 1) * _kept_less(setup) + _saved_of_rest(setup)


def _kept_less(setup: Setup) -> int:
    assert isinstance(setup.shape, Eagle3Shape)
    return setup.shape.kept_less(setup)


def _batch_bytes(setup: Setup) -> int:
    """Bytes of the integers and masks of one packed sequence. The target's hidden states stay on the host and
    stream through tiles.
    """
    # int64 position and teacher token of each slot; bool `supervised` and `contributing` of each live slot
    # and step.
    return setup.slots * 2 * INT64 + setup.live_slots * 2 * setup.ttt_steps


def _saved_by_step(setup: Setup) -> tuple[int, int]:
    """Bytes that one layer keeps of one step for backward, without statistics: up to the attention's output,
    and after it.

    `recompute` and `offload` keep the hidden state and the attention's output. `keep` keeps all that autograd
    saves of the functions in draft/decoder.py and layer.py.
    """
    shape, S, item = setup.shape, setup.live_slots, setup.itemsize
    H, A, inner = shape.hidden_size, shape.query_size, shape.intermediate_size
    if setup.activation != "keep":
        return S * (H + A) * item, 0
    # The concatenated norms [S, 2H], q before and out after the attention, and cos and sin in fp32.
    before = S * ((2 * H + 2 * A) * item + 2 * shape.angle_size * FP32)
    # The norm's output, gate, up, silu(gate) and their product.
    after = S * (H + 4 * inner) * item
    if setup.device == "accelerator":
        # A fused norm keeps its input: before the attention the embedding and the hidden state, after it the
        # hidden state.
        return before + 2 * S * H * item, after + S * H * item
    # A norm composed of elementwise operators keeps, in fp32, its input (not that of the embedding, which has
    # no gradient) and the normalised input.
    return before + 3 * S * H * FP32, after + 2 * S * H * FP32


def _saved_of_rest(setup: Setup) -> int:
    """Bytes that step 0 keeps of the slots that are not live: their hidden states. They exist only for drafts
    of one layer.
    """
    shape, rest, item = setup.shape, setup.slots - setup.live_slots, setup.itemsize
    H = shape.hidden_size
    if setup.activation != "keep":
        return rest * H * item
    norms = 2 * H * item if setup.device == "accelerator" else 3 * H * FP32
    return rest * (2 * H * item + norms + 2 * shape.angle_size * FP32)


def _statistics(setup: Setup) -> int:
    """Bytes that all steps keep of log-sum-exps, token ids and positions."""
    rest = (setup.slots - setup.live_slots) * 2 * INT64
    return (
        setup.ttt_steps
        * setup.live_slots
        * (setup.shape.num_layers * setup.shape.num_heads * FP32 + 2 * INT64)
        + rest
    )


def _kept_by_forward(setup: Setup) -> Parts:
    """Bytes that are kept when the last step has run."""
    K, layers = setup.ttt_steps, setup.shape.num_layers
    hidden = setup.live_slots * setup.shape.hidden_size * setup.itemsize
    saved = K * layers * sum(_saved_by_step(setup)) + _saved_of_rest(setup)
    if _kept_less(setup):
        # No step reads the output of the one before, but the loss does.
        saved += (K - 1) * (hidden - _kept_less(setup))
    if _offloaded_activations(setup):
        # The loss still needs the K outputs on the device; the tensors of one step are being copied.
        saved = K * hidden + sum(_saved_by_step(setup))
    # The last step's output is no step's input, but the loss reads it.
    saved += hidden + _kept_for_norms(setup, K - 1)
    return {"saved activations": saved + _statistics(setup), **keys_and_values(setup)}


def _kept_for_norms(setup: Setup, count: int) -> int:
    """Bytes of `count` steps' outputs that `norm_output` keeps as inputs of its norm."""
    assert isinstance(setup.shape, Eagle3Shape)
    kept = setup.live_slots * setup.shape.hidden_size * setup.itemsize
    return count * kept if setup.shape.norm_output else 0


def _weight_sums(setup: Setup) -> int:
    """Bytes of the sums of the layers' weight gradients over the steps: fp32, but under `keep` autograd sums
    them in the weights' own dtype.
    """
    shape = setup.shape
    weights = sum(sum(shape.layer_weights(layer).values()) for layer in range(shape.num_layers))
    return weights * (setup.itemsize if setup.activation == "keep" else FP32)


def _kept_in_backward(setup: Setup, columns: int, steps_done: int) -> Parts:
    """Bytes still kept in the first layer's backward of a step, after the backward of `steps_done` steps."""
    shape, layers = setup.shape, setup.shape.num_layers
    steps = setup.ttt_steps - steps_done
    before, after = _saved_by_step(setup)
    # The later layers of this step have run their backward, and so has what follows this layer's attention.
    saved = (
        steps * layers * (before + after) - (layers - 1) * (before + after) - after + _saved_of_rest(setup)
    )
    saved -= (steps - 1) * _kept_less(setup)
    if _offloaded_activations(setup):
        saved = 2 * (before + after)
    saved += _kept_for_norms(setup, steps - 1)
    return {
        "saved activations": saved + _statistics(setup),
        **keys_and_values(setup),
        # This step's loss gradient has been added to the hidden state's already.
        "loss gradients": (steps - 1) * columns * shape.hidden_size * setup.itemsize,
    }


def _backward_sums(setup: Setup, steps_done: int) -> Parts:
    """Bytes of gradient sums after the backward of `steps_done` steps: of the weights, of the step-0 keys and
    values (fp32), and of the diagonals of the steps that remain.
    """
    kv = keys_and_values(setup)
    step_0 = kv["step-0 KV"] // setup.itemsize * FP32
    diagonals = kv["diagonal KV"] * (setup.ttt_steps - 1 - steps_done) // max(1, setup.ttt_steps - 1)
    return {"KV gradients": step_0 + diagonals, "weight-gradient sums": _weight_sums(setup)}


def _passing_gradients(setup: Setup) -> int:
    """Bytes of the gradients that exist throughout a layer's backward: of its output, of its input and of the
    attention's output.
    """
    shape = setup.shape
    hidden = 1 if setup.activation == "keep" else 2
    return setup.live_slots * (hidden * shape.hidden_size + shape.query_size) * setup.itemsize


def _tile_before_attention(setup: Setup) -> int:
    """Bytes of one tile in `project_backward`: the repeated norms, and the rotated gradients of q and k."""
    shape, item = setup.shape, setup.itemsize
    turned = shape.query_size + shape.kv_size
    # The embedding, the concatenated norms [t, 2H], their gradient, and the backward of one norm.
    norm_backward = item if setup.device == "accelerator" else 3 * FP32
    return tile_slots(setup) * (
        turned * item + shape.hidden_size * (5 * item + 2 * norm_entries(setup) + norm_backward)
    )


def _backward_moments(setup: Setup, columns: int) -> list[Parts]:
    """Bytes at each moment of the backward that may be the worst, all in the first layer.

    The attention's backward of the last step allocates the gradient sums, which stay until step 0, while
    nearly everything that forward saved still exists. The tiles after the attention run before it in
    backward, so they coincide with those sums only from the next step on.
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
    first = {
        **_kept_in_backward(setup, 0, setup.ttt_steps - 1),
        **_backward_sums(setup, setup.ttt_steps - 1),
    }
    # At step 0 the gradient covers all slots again, not only the live ones.
    whole = setup.slots * setup.shape.hidden_size * setup.itemsize
    if setup.slots > setup.live_slots:
        moments.append({**first, "gradient of all hidden states": whole})
    if exchanged := gradient_exchange(setup):
        # The gradients of step 0's output and of its attention's output exist too.
        passing = through - setup.live_slots * setup.shape.hidden_size * setup.itemsize
        moments.append({**first, "exchange of KV gradients": whole + passing + exchanged})
    return moments


def _step_flops(setup: Setup, shape: Eagle3Shape, pairs: int) -> Flops:
    """FLOPs of one rank for one packed sequence; `pairs` as in `Eagle3Shape.flops`."""
    slots, steps = setup.live_slots, setup.ttt_steps
    fc = shape.fc_size
    layers = [shape.layer_weights(layer) for layer in range(shape.num_layers)]
    # A matrix costs one product forward and two backward; fc costs one backward, because its input is
    # constant. Slots that are not live have keys and values only.
    rest = (setup.slots - slots) * 3 * sum(layers[0][name] for name in ("k", "v"))
    each = steps * sum(sum(weights.values()) for weights in layers) - (steps - 1) * shape.projected_once
    matmul = 2 * (setup.slots * 2 * fc + rest + slots * 3 * each)
    recompute = 0
    if setup.activation != "keep":
        # k, v and the attention's output are kept, and backward does not need the output of `down`.
        again = steps * sum(weights[name] for weights in layers for name in ("q", "o", "gate", "up"))
        if shape.projected_once:
            again -= (steps - 1) * layers[0]["q"]
        recompute = 2 * slots * again
    attention = 2 * pairs * shape.query_size // setup.ulysses * steps * shape.num_layers
    head = 2 * slots * shape.hidden_size * shape.draft_vocab_size
    teacher = 2 * slots * shape.target_hidden_size * shape.draft_vocab_size
    return Flops(
        layers=matmul,
        recompute=recompute,
        # Two products forward (scores, output); five backward (scores again, dp, dq, dk, dv).
        attention_forward=2 * attention,
        attention_backward=5 * attention,
        # The teacher's logits once; in each step the draft's logits and two gradients.
        loss=teacher + head * 3 * steps,
    )


def _elementwise_bytes(setup: Setup) -> int:
    """Bytes that norms, rotations, activations and the softmax of the loss read and write, for one rank and
    one packed sequence.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    wide = 10 * shape.hidden_size + 4 * (shape.query_size + 2 * shape.kv_size) + 6 * shape.intermediate_size
    passes = 3 if setup.activation == "keep" else 4
    # Step k reads k diagonals of keys and of values: K (K - 1) / 2 over the steps. They are read once in
    # forward and count twice in backward.
    diagonals = 3 * 2 * shape.kv_size * steps * (steps - 1) // 2
    softmax = 8 * shape.draft_vocab_size * FP32 * (steps + 1)
    return setup.live_slots * (shape.num_layers * item * (steps * passes * wide + diagonals) + softmax)
