"""The costs of a DFlash draft: what its blocks keep for backward, the temporary memory of a step, calls,
bytes sent and FLOPs (docs/dflash.md, "How it trains on ranks").

To the context a block's B inputs are further query heads, so the attention's costs are those of one step of
EAGLE-3 with B times the heads.

Legend: S slots of a rank, Q anchors of it, B inputs of a block, R = Q * B rows, H hidden size, A = Hq * D
entries of a row's queries, kv entries of its keys, K = B - 1 guesses, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from eagle3_ds.attention.costs import (
    SHORT,
    attention_backward,
    gradient_exchange,
    keys_and_values,
    unroll_traffic,
)
from eagle3_ds.attention.rotary import rotated_channels
from eagle3_ds.costs import FP32, INT64, Activation, DraftShape, Flops, Parts, SequenceBytes, Setup, Traffic
from eagle3_ds.draft.costs import loss_parts, norm_entries
from eagle3_ds.draft.geometry import aux_size, has_own_embedding, target_hidden_size


@dataclass(frozen=True)
class DFlashShape(DraftShape):
    """Sizes of a DFlash draft.

    Attributes:
        aux_size: entries of a slot's captured hidden states, which `fc` reads.
        own_mask: whether it has a mask embedding of its own.
    """

    aux_size: int = 0
    own_mask: bool = False

    @classmethod
    def of(cls, config: Any) -> DFlashShape:
        """From the draft's transformers config (`build_dflash_config`)."""
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
            target_size=target_hidden_size(config) if has_own_embedding(config) else None,
            rotated_size=None if rotated == config.head_dim else rotated,
            aux_size=aux_size(config),
            own_mask=config.mask_embedding,
        )

    def layer_weights(self, layer: int) -> dict[str, int]:
        """Parameters of each matrix of a layer; all layers are alike."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q": self.query_size * hidden,
            "k": self.kv_size * hidden,
            "v": self.kv_size * hidden,
            "o": hidden * self.query_size,
            "gate": inner * hidden,
            "up": inner * hidden,
            "down": hidden * inner,
        }

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor: the mask embedding, fc and its norm, layers, final norm, head."""
        hidden = self.hidden_size
        sizes = [hidden] if self.own_mask else []
        sizes += [self.aux_size * hidden, hidden]
        for layer in range(self.num_layers):
            sizes += [*self.layer_weights(layer).values(), self.head_dim, self.head_dim, hidden, hidden]
        return (*sizes, hidden, self.draft_vocab_size * hidden)

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The pass over the blocks moves nothing to the host (the recipe refuses `offload`)."""
        return ("keep", "recompute")

    @property
    def live_slots_alone(self) -> bool:
        """True: a slot that is no anchor gives the keys and values of all layers, which need no layer."""
        return True

    @property
    def fc_size(self) -> int:
        """Parameters of `fc`."""
        return self.aux_size * self.hidden_size

    @property
    def layer_size(self) -> int:
        """Parameters of the matrices of a layer."""
        return sum(self.layer_weights(0).values())

    def sequence_bytes(self, setup: Setup) -> SequenceBytes:
        """Bytes that one packed sequence makes a rank hold."""
        slots, live = setup.slots, setup.live_slots
        return SequenceBytes(
            # int64 position and teacher token of each slot; bool `supervised` and `contributing` of each
            # anchor and guess.
            batch=slots * 2 * INT64 + live * 2 * setup.ttt_steps,
            loss={
                **_kept(setup, self, self.num_layers),
                "last layer's output": _rows(setup) * (self.hidden_size * setup.itemsize + INT64),
                **loss_parts(setup, live),
            },
            backward=tuple(_backward_moments(setup, self)),
            # fc's gradient is the last to be made.
            weight_sums=self.fc_size * FP32,
            offloaded=0,
        )

    def attention_traffic(self, setup: Setup) -> list[Traffic]:
        """Calls and bytes of one packed sequence, forward and backward, all layers; none on an axis of one
        rank.
        """
        found = [traffic for traffic in unroll_traffic(_wide(setup)) if traffic.axis == "ulysses"]
        # With a window each input of a block is a pass of its own over the context's keys.
        passes = 1 if setup.window is None else _inputs(setup)
        of_ring = unroll_traffic(replace(_wide(setup), ttt_steps=passes))
        return found + [traffic for traffic in of_ring if traffic.axis == "ring"]

    def flops(self, setup: Setup, pairs: int) -> Flops:
        """FLOPs of one rank for one packed sequence. `pairs` are those of a ring rank of anchors and keys;
        each of its Ulysses ranks computes them for its heads, and for all inputs of a block.
        """
        rows, inputs, layers = _rows(setup), _inputs(setup), self.num_layers
        # A matrix costs one product forward and two backward; fc costs one backward, because its input is
        # constant. Every slot has keys and values of every layer.
        context = setup.slots * layers * 2 * self.kv_size * self.hidden_size
        each = rows * layers * self.layer_size
        # The blocks' own keys: two products forward (scores, output), four backward (dp, dq, dk, dv), and the
        # scores again.
        own = rows * layers * inputs * self.query_size
        matmul = 2 * (setup.slots * 2 * self.fc_size + 3 * context + 3 * each + 6 * own)
        again = own + (0 if setup.activation == "keep" else context + each)
        attention = 2 * pairs * inputs * self.query_size // setup.ulysses * layers
        head = 2 * setup.live_slots * self.hidden_size * self.draft_vocab_size
        teacher = 2 * setup.live_slots * self.target_hidden_size * self.draft_vocab_size
        return Flops(
            layers=matmul,
            recompute=2 * again,
            # As EAGLE-3's: two products forward, five backward.
            attention_forward=2 * attention,
            attention_backward=5 * attention,
            loss=teacher + head * 3 * setup.ttt_steps,
        )

    def elementwise_bytes(self, setup: Setup) -> int:
        """Bytes that elementwise work reads and writes."""
        item, passes = setup.itemsize, 3 if setup.activation == "keep" else 4
        wide = 8 * self.hidden_size + 6 * (self.query_size + self.kv_size) + 6 * self.intermediate_size
        context = 3 * self.hidden_size + 6 * self.kv_size
        layers = passes * item * self.num_layers * (_rows(setup) * wide + setup.slots * context)
        return layers + setup.live_slots * 8 * self.draft_vocab_size * FP32 * (setup.ttt_steps + 1)


def _inputs(setup: Setup) -> int:
    """B."""
    return setup.ttt_steps + 1


def _rows(setup: Setup) -> int:
    """R."""
    return setup.live_slots * _inputs(setup)


def _scattered(setup: Setup) -> bool:
    """Whether anchors are drawn so sparsely that runs of them are short, on average shorter than the rows
    that `FoldedKernel` leaves as they are.
    """
    return 1 - setup.anchor_share > 1 / SHORT


def _wide(setup: Setup) -> Setup:
    """One step of anchors whose query heads are those of all inputs of their blocks."""
    shape = replace(setup.shape, num_heads=setup.shape.num_heads * _inputs(setup))
    return replace(setup, shape=shape, ttt_steps=1)


def _norm(setup: Setup, entries: int) -> int:
    """Bytes that autograd keeps of a norm of so many entries: its input, or, where it is composed of
    elementwise operators, its input and the normalised input in fp32.
    """
    return entries * (setup.itemsize if setup.device == "accelerator" else 2 * FP32)


def _kept_of_layer(setup: Setup, shape: DFlashShape) -> tuple[int, int]:
    """Bytes that one layer keeps for backward: up to the attention, and what only the rest of it reads.

    `recompute` keeps the block's input, queries, keys and values, the attention's output, as it was made and
    in the order of the rows, and its statistics. `keep` keeps all that autograd saves.
    """
    H, A, kv, inner = shape.hidden_size, shape.query_size, shape.kv_size, shape.intermediate_size
    item, rows = setup.itemsize, _rows(setup)
    attended = rows * ((2 * A + 2 * kv) * item + shape.num_heads * FP32)
    if setup.activation != "keep":
        return attended + rows * H * item, rows * A * item
    before = rows * (H * item + sum(_norm(setup, entries) for entries in (H, A, kv)))
    # Of every slot the context, and the norm of its keys.
    context = setup.slots * (H * item + _norm(setup, H) + _norm(setup, kv))
    after = rows * ((A + H + 4 * inner) * item + _norm(setup, H))
    return attended + before + context, after


def _kept(setup: Setup, shape: DFlashShape, layers: int, of_last: bool = True) -> Parts:
    """Bytes that are kept while `layers` layers have their backward ahead; `of_last`: the last of them still
    has what follows its attention.
    """
    before, after = _kept_of_layer(setup, shape)
    saved = layers * before + (layers if of_last else layers - 1) * after
    # fc's output, and the angles of slots and rows.
    saved += setup.slots * shape.hidden_size * setup.itemsize
    saved += (setup.slots + _rows(setup)) * 2 * shape.angle_size * FP32
    context = keys_and_values(setup)["step-0 KV"] * layers // shape.num_layers
    return {"saved activations": saved, "context KV": context}


def _tile_rows(setup: Setup, rows: int) -> int:
    """Rows of one tile of `in_tiles`: what fits `train.tile_bytes`; all under `keep`, which has no tiles."""
    shape = setup.shape
    if setup.activation == "keep":
        return rows
    per_row = (7 * shape.intermediate_size + 8 * shape.hidden_size) * setup.itemsize
    return min(rows, setup.tile_bytes // per_row)


def _sums(setup: Setup, weights: int) -> int:
    """Bytes of the gradients of so many weights while a layer's backward runs: fp32 sums over tiles, and a
    tile's own; under `keep` one.
    """
    return weights * (setup.itemsize if setup.activation == "keep" else FP32 + setup.itemsize)


def _backward_moments(setup: Setup, shape: DFlashShape) -> list[Parts]:
    """Bytes at each moment of the backward that may be the worst: in the last layer, where most is kept, and
    in the first, where the gradients of the other layers' weights exist.
    """
    hidden = setup.live_slots * shape.hidden_size * setup.itemsize
    rows, layers = _rows(setup) * shape.hidden_size * setup.itemsize, shape.num_layers
    # Each guess's gradient, and all of them joined.
    joined = setup.ttt_steps * hidden + rows
    moments = [{**_kept(setup, shape, layers), "loss gradients": joined}]
    for layer in {layers, 1}:
        done = {"layers' gradients": (layers - layer) * shape.layer_size * setup.itemsize}
        moments += [{**done, **moment} for moment in _moments_of_layer(setup, shape, layer)]
    states = setup.slots * shape.hidden_size * setup.itemsize
    moments.append(
        {
            "layers' gradients": layers * shape.layer_size * setup.itemsize,
            "gradient of fc": 2 * states + shape.fc_size * FP32,
        }
    )
    return moments


def _moments_of_layer(setup: Setup, shape: DFlashShape, layer: int) -> list[Parts]:
    """The moments of the backward of one layer, of which `layer` - 1 are before it."""
    H, A, kv, item = shape.hidden_size, shape.query_size, shape.kv_size, setup.itemsize
    rows, slots, weights = _rows(setup), setup.slots, shape.layer_weights(0)
    kv_weights, wide = weights["k"] + weights["v"], _wide(setup)
    whole, half = _kept(setup, shape, layer), _kept(setup, shape, layer, of_last=False)
    after = sum(weights[name] for name in ("o", "gate", "up", "down"))
    # The sum over the later layers of the gradient of fc's output.
    states = {"gradient of fc's output": slots * H * item if layer < shape.num_layers else 0}
    if setup.activation == "keep":
        # The gradient of the layer's output and of `down`, those of silu(gate) * up and of its two factors;
        # the product itself is no longer kept.
        mlp = (rows * (H + 2 * shape.intermediate_size) + weights["down"]) * item
    else:
        mlp = rows * (2 * H + A) * item + _sums(setup, after) + _tile_after(setup, shape)
    # The gradient of the layer's input, of the attention's output in both orders, and the block's own.
    passing = rows * (H + 3 * A + 2 * kv) * item
    context_sums = keys_and_values(setup)["step-0 KV"] // shape.num_layers // item * FP32
    found = [
        {**whole, **states, "tile of the MLP": mlp},
        {
            **half,
            **states,
            "KV gradients": context_sums,
            "attention's backward": passing + attention_backward(wide, _scattered(setup)),
        },
    ]
    if exchanged := gradient_exchange(wide):
        found.append(
            {
                **half,
                **states,
                "KV gradients": context_sums,
                "exchange of KV gradients": passing + exchanged,
            }
        )
    arrived = 2 * slots * kv * item
    tile = _tile_rows(setup, rows) * (2 * (A + 2 * kv) * item + H * (2 * item + norm_entries(setup)))
    projected = rows * (2 * H + A + 2 * kv) * item + arrived + _sums(setup, weights["q"] + kv_weights) + tile
    found.append({**half, **states, "tile of the projections": projected})
    tile = _tile_rows(setup, slots) * (4 * kv * item + H * (2 * item + norm_entries(setup)))
    context = rows * H * item + arrived + slots * H * item + _sums(setup, kv_weights) + tile
    found.append({**half, **states, "tile of the context": context})
    return found


def _tile_after(setup: Setup, shape: DFlashShape) -> int:
    """Bytes of one tile of what follows the attention: repeated, with its gradients."""
    H, inner, item = shape.hidden_size, shape.intermediate_size, setup.itemsize
    return _tile_rows(setup, _rows(setup)) * (6 * inner * item + H * (2 * item + norm_entries(setup)))
