"""One way of running a draft: its sizes, and what else a formula of bytes, calls or seconds reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from eagle3_ds.config import Activation, ExchangeName, Recipe, ZeroGroup
from eagle3_ds.costs.amounts import Flops, SequenceBytes, Traffic
from eagle3_ds.layout import slots_of_a_rank

DeviceSort = Literal["accelerator", "cpu"]

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft; its algorithm derives a class from this one that says what they cost.

    `vocab_size` is the target's, `draft_vocab_size` the draft's own.

    Attributes:
        target_size: the target's hidden size; None for the draft's.
        rotated_size: channels of a head that turn; None for all.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_layers: int = 1
    target_size: int | None = None
    rotated_size: int | None = None

    @property
    def target_hidden_size(self) -> int:
        """The target's hidden size."""
        return self.target_size or self.hidden_size

    @property
    def angle_size(self) -> int:
        """Entries of the cosines, and of the sines, of one slot."""
        return self.rotated_size or self.head_dim

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that a server keeps of one token, over all layers."""
        return 2 * self.num_layers * self.kv_size * itemsize

    @property
    def query_size(self) -> int:
        """Entries of one slot's queries, over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Entries of one slot's keys, over all heads; its values have as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor."""
        raise NotImplementedError

    def layer_weights(self, layer: int) -> dict[str, int]:
        """Parameters of each matrix of a layer."""
        raise NotImplementedError

    @property
    def activations(self) -> tuple[Activation, ...]:
        """What `train.activation` may be for this draft."""
        return get_args(Activation)

    @property
    def live_slots_alone(self) -> bool:
        """Whether slots that no loss reads give keys and values and cost nothing else (layout/plan.py)."""
        raise NotImplementedError

    def sequence_bytes(self, setup: Setup) -> SequenceBytes:
        """What a packed sequence makes a rank hold."""
        raise NotImplementedError

    def attention_traffic(self, setup: Setup) -> list[Traffic]:
        """Of one packed sequence, forward and backward, all layers; nothing on an axis with one rank."""
        raise NotImplementedError

    def flops(self, setup: Setup, pairs: int) -> Flops:
        """One rank, one packed sequence; `pairs`: query-key pairs of the busiest ring rank in one pass."""
        raise NotImplementedError

    def elementwise_bytes(self, setup: Setup) -> int:
        """Bytes that norms, rotations, activations and the softmax of the loss move, one rank, one
        sequence.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of a DeepSpeed JSON that change memory or time; the defaults are DeepSpeed's.

    Attributes:
        stage: of ZeRO, 0 to 3.
        reduce_bucket: elements of one gradient bucket; its buffer has this size even for a small model.
        overlap_comm: gradients are reduced while the backward computes.
        contiguous_gradients: gradients are copied into the bucket's buffer.
        offload_optimizer, offload_parameters: to host memory.
        secondary_partition: ranks that share ZeRO++'s second copy of the weights; 1 means no such copy.
        persistence_threshold: a ZeRO-3 parameter of fewer elements stays whole on every rank.
    """

    stage: int = 0
    reduce_bucket: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    offload_optimizer: bool = False
    offload_parameters: bool = False
    secondary_partition: int = 1
    persistence_threshold: int = 100_000

    @classmethod
    def of(cls, deepspeed_config: Mapping[str, Any]) -> ZeroSettings:
        """From a DeepSpeed JSON read by `load_deepspeed_config`, which refuses other names of these keys."""
        zero = deepspeed_config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        overlap = zero.get("overlap_comm")

        def offloads(key: str) -> bool:
            return ((zero.get(key) or {}).get("device") or "none") != "none"

        def of_stage3(name: str, default: int) -> int:
            return int(zero.get(f"stage3_{name}", zero.get(name, default)))

        return cls(
            stage=stage,
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap_comm=stage == 3 if overlap is None else overlap,
            contiguous_gradients=zero.get("contiguous_gradients", True),
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
            secondary_partition=int(zero.get("zero_hpz_partition_size", 1)),
            persistence_threshold=of_stage3("param_persistence_threshold", cls.persistence_threshold),
        )


@dataclass(frozen=True)
class Setup:
    """One way of running a draft of one shape.

    Attributes:
        shape: the draft's sizes.
        length: tokens of one packed sequence.
        ttt_steps: K.
        draft_dp, ring, ulysses: degrees of the mesh.
        zero: settings of the DeepSpeed JSON.
        zero_group: the ranks over which ZeRO shards, as in the recipe.
        activation: what a TTT step keeps for backward, as in the recipe.
        kv_exchange: how the step-0 keys and values travel over the ring.
        dtype: of training.
        accumulation: packed sequences per draft_dp rank and optimizer step.
        kv_bytes: the most bytes of other ranks' step-0 keys and values, gradients included, that a rank may
            hold in each layer.
        tile_bytes, loss_tile_bytes: budgets of one tile of slots in a layer, and of one tile of the loss.
        chunks_per_rank: see `SpanPlan.make`.
        target_bytes: weights of a target that runs beside the draft (`data.hidden_states: online`), sharded
            over all ranks.
        decoder_bytes, decoder_draft_bytes: weights of the whole target, and of the whole draft, with which
            rank 0 decodes between two steps (`eval.during`).
        supervised: the share of tokens in the loss, taken as the share of live slots too.
        anchor_share: the share of those that are trained in an epoch, as in the recipe.
        window: the most keys that a position of the draft sees; None for no limit.
        device: decides the attention kernel's workspace. An accelerator is taken to have the fused
            kernels of CUDA.
    """

    shape: DraftShape
    length: int
    ttt_steps: int = 7
    draft_dp: int = 1
    ring: int = 1
    ulysses: int = 1
    zero: ZeroSettings = ZeroSettings()
    zero_group: ZeroGroup = "all"
    activation: Activation = "recompute"
    kv_exchange: ExchangeName = "gather"
    dtype: str = "bfloat16"
    accumulation: int = 1
    kv_bytes: int = 2**33
    tile_bytes: int = 2**30
    loss_tile_bytes: int = 2**30
    chunks_per_rank: int = 8
    target_bytes: int = 0
    decoder_bytes: int = 0
    decoder_draft_bytes: int = 0
    supervised: float = 1.0
    anchor_share: float = 1.0
    window: int | None = None
    device: DeviceSort = "accelerator"

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        deepspeed_config: Mapping[str, Any],
        shape: DraftShape,
        draft_dp: int,
        device: DeviceSort = "accelerator",
    ) -> Setup:
        """From a recipe. `kv_exchange: auto` is taken as gather; `choose_kv_exchange` decides it later.

        Args:
            recipe: the recipe.
            deepspeed_config: the DeepSpeed JSON that it names, read.
            shape: the draft's sizes.
            draft_dp: replicas.
            device: as the attribute.
        """
        parallel = recipe.parallel
        return cls(
            shape=shape,
            length=recipe.data.max_length,
            ttt_steps=recipe.draft.num_guesses,
            draft_dp=draft_dp,
            ring=parallel.ring,
            ulysses=parallel.ulysses,
            zero=ZeroSettings.of(deepspeed_config),
            zero_group=parallel.zero_group,
            activation=recipe.train.activation,
            kv_exchange="ring" if parallel.kv_exchange == "ring" else "gather",
            dtype=recipe.train.dtype,
            accumulation=recipe.train.accumulation,
            kv_bytes=parallel.kv_bytes,
            tile_bytes=recipe.train.tile_bytes,
            loss_tile_bytes=recipe.loss.tile_bytes,
            chunks_per_rank=parallel.chunks_per_rank,
            anchor_share=recipe.draft.anchor_share,
            window=recipe.draft.sliding_window,
            device=device,
        )

    @property
    def sp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.draft_dp * self.sp

    @property
    def itemsize(self) -> int:
        """Bytes of one entry of the training dtype."""
        return ITEMSIZE[self.dtype]

    @property
    def padded_length(self) -> int:
        """Slots of all ranks of a sequence, padding included."""
        return self.slots * self.sp

    @property
    def slots(self) -> int:
        """Slots of one rank, padding included."""
        return self._slots[1]

    @property
    def live_slots(self) -> int:
        """Live slots of one rank (layout/plan.py); all slots if the draft's shape cannot skip the others."""
        return self._slots[0]

    @property
    def columns(self) -> int:
        """Slots of one ring rank. Each of its Ulysses ranks holds a part of them, and computes the attention
        of all of them for a part of the heads.
        """
        return self.slots * self.ulysses

    @property
    def live_columns(self) -> int:
        """Live slots of one ring rank."""
        return self.live_slots * self.ulysses

    @property
    def live_share(self) -> float:
        """The share of slots that the loss reads."""
        return self.supervised * self.anchor_share

    @property
    def _slots(self) -> tuple[int, int]:
        live = round(self.length * self.live_share) if self.shape.live_slots_alone else self.length
        return slots_of_a_rank(self.length, live, self.ring, self.ulysses, self.chunks_per_rank)

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO shards the training state."""
        return self.world_size if self.zero_group == "all" else self.draft_dp
