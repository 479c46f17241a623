"""A trainer and packs of any size, for benchmarks that measure the real step. Random weights and tokens,
nothing on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.dflash.config import dflash_keys
from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.algorithms.peagle import PEagleShape
from eagle3_ds.config import Recipe, fill_deepspeed_config
from eagle3_ds.costs import Setup
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.draft.geometry import aux_keys, window_keys
from eagle3_ds.layout import PackedSequence, live_slots
from eagle3_ds.topology import Topology, maybe_setup_distributed
from eagle3_ds.train.trainer import DraftTrainer

ROPE = {"rope_type": "default", "rope_theta": 500_000.0}


@dataclass(frozen=True)
class SampleRun:
    """One run: a recipe's numbers without its files.

    Attributes:
        lengths: documents of each packed sequence; None is one document of `length`.
        deepspeed: the DeepSpeed JSON as a mapping.
        ttt_steps: K, the guesses of a slot; a DFlash block has one input more.
        answered: share of each document, at its end, that the assistant said, so that is supervised.
        anchor_share, window: of a DFlash draft.
    """

    shape: Eagle3Shape | DFlashShape
    length: int
    ttt_steps: int = 7
    draft_dp: int = 1
    ring: int = 1
    ulysses: int = 1
    deepspeed: dict[str, Any] | None = None
    zero_group: str = "all"
    activation: str = "recompute"
    kv_exchange: str = "gather"
    dtype: str = "float32"
    accumulation: int = 1
    kv_bytes: int = 0
    tile_bytes: int = 2**22
    loss_tile_bytes: int = 2**22
    kernel: str = "auto"
    lengths: tuple[int, ...] | None = None
    answered: float = 1.0
    anchor_share: float = 1.0
    window: int | None = None

    @property
    def world_size(self) -> int:
        return self.draft_dp * self.ring * self.ulysses

    @property
    def algorithm(self) -> str:
        """The one whose shape it is."""
        if isinstance(self.shape, DFlashShape):
            return "dflash"
        return "peagle" if isinstance(self.shape, PEagleShape) else "eagle3"

    @property
    def aux_size(self) -> int:
        """Entries of a slot's captured hidden states."""
        return self.shape.aux_size or 3 * self.shape.target_hidden_size

    def recipe(self) -> Recipe:
        """`target` and `data` are there because a recipe has them, and are never opened."""
        blocks = {"block_size": self.ttt_steps + 1, "anchor_share": self.anchor_share}
        sections: dict[str, Any] = {
            "target": {"path": "none"},
            "draft": {
                "algorithm": self.algorithm,
                "vocab_size": self.shape.draft_vocab_size,
                "num_layers": self.shape.num_layers,
                "sliding_window": self.window,
                **(blocks if self.algorithm == "dflash" else {"ttt_steps": self.ttt_steps}),
            },
            "data": {"train": ("none",), "max_length": self.length},
            "parallel": {
                "draft_dp": self.draft_dp,
                "ring": self.ring,
                "ulysses": self.ulysses,
                "zero_group": self.zero_group,
                "kv_exchange": self.kv_exchange,
                "kv_bytes": self.kv_bytes,
            },
            "attention": {"kernel": self.kernel},
            "loss": {"tile_bytes": self.loss_tile_bytes},
            "train": {
                "steps": 1,
                "accumulation": self.accumulation,
                "dtype": self.dtype,
                "activation": self.activation,
                "tile_bytes": self.tile_bytes,
            },
            "eval": {"draft_tokens": self.ttt_steps},
            "deepspeed": "none",
            "output_dir": "none",
        }
        return Recipe.model_validate(sections)

    def setup(self) -> Setup:
        """The same as the planner sees it."""
        setup = Setup.of(self.recipe(), self.deepspeed or {}, self.shape, self.draft_dp, device="cpu")
        supervision = ALGORITHMS[self.algorithm].supervision(self.recipe())
        live = live_slots(self.lengths or (self.length,), self.loss_mask(), supervision, self.anchors())
        # Of the live slots a share has been drawn already.
        return replace(setup, supervised=float(live.mean()) / setup.anchor_share)

    def anchors(self) -> Tensor | None:
        """bool [length], as `PackedSequence.anchors`; the same in every pack."""
        recipe, lengths = self.recipe(), self.lengths or (self.length,)
        draw = ALGORITHMS[self.algorithm].anchors(recipe)
        return None if draw is None else draw(0, range(len(lengths)), lengths, self.loss_mask())

    def config(self) -> LlamaConfig:
        shape, rope = self.shape, ROPE
        if shape.rotated_size is not None:
            rope = {**ROPE, "partial_rotary_factor": shape.rotated_size / shape.head_dim}
        return LlamaConfig(
            **aux_keys(self.aux_size // shape.target_hidden_size, shape.target_hidden_size),
            vocab_size=shape.vocab_size,
            draft_vocab_size=shape.draft_vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=self.length,
            rope_parameters=rope,
            tie_word_embeddings=False,
            **self._own_keys(),
        )

    def _own_keys(self) -> dict[str, Any]:
        """The config's keys that not every algorithm has."""
        if self.algorithm == "dflash":
            assert isinstance(self.shape, DFlashShape)
            keys = dflash_keys(self.ttt_steps + 1, 0, self.shape.own_mask, block_causal=False)
            return {**keys, **window_keys(self.window, self.shape.num_layers)}
        return {"mask_token_id": 0} if self.algorithm == "peagle" else {}

    def topology(self) -> Topology:
        """Joins the world. Collective."""
        return maybe_setup_distributed(self.ulysses, self.ring, self.draft_dp)

    def trainer(self, topology: Topology) -> DraftTrainer:
        """Collective; the same weights on all ranks."""
        torch.manual_seed(0)
        shape, recipe = self.shape, self.recipe()
        settings = fill_deepspeed_config(self.deepspeed or {}, recipe, self.world_size, self.draft_dp)
        widths = (shape.hidden_size, shape.target_hidden_size)
        embedding, head = (torch.randn(shape.vocab_size, width) for width in widths)
        kept = torch.arange(shape.draft_vocab_size)
        vocabulary = VocabularyMap(torch.zeros_like(kept), torch.arange(shape.vocab_size) < len(kept))
        draft = ALGORITHMS[self.algorithm].build(self.config())
        return DraftTrainer(recipe, settings, topology, draft, embedding, head, vocabulary)

    def loss_mask(self) -> Tensor:
        """bool [length], of every packed sequence."""
        position = torch.cat([torch.arange(n) / n for n in self.lengths or (self.length,)])
        return position >= 1 - self.answered

    def packs(self, dp_rank: int = 0) -> list[PackedSequence]:
        """The packs of one step of one draft_dp rank. Every teacher token is in the draft vocabulary."""
        generator = torch.Generator().manual_seed(dp_rank)
        return [self._pack(generator) for _ in range(self.accumulation)]

    def _pack(self, generator: torch.Generator) -> PackedSequence:
        shape, length = self.shape, self.length
        dtype = getattr(torch, self.dtype)

        def tokens(vocabulary: int) -> Tensor:
            return torch.randint(0, vocabulary, (length,), generator=generator)

        def hidden(width: int) -> Tensor:
            return torch.randn(length, width, generator=generator).to(dtype)

        return PackedSequence(
            token_ids=tokens(shape.vocab_size),
            loss_mask=self.loss_mask(),
            lengths=self.lengths or (length,),
            anchors=self.anchors(),
            teacher_token=tokens(shape.draft_vocab_size),
            aux=hidden(self.aux_size),
            teacher=hidden(shape.target_hidden_size),
        )


def small_buckets(deepspeed: dict[str, Any], elements: int = 100_000) -> dict[str, Any]:
    """The same JSON with gradient buckets that fit a small model; DeepSpeed's default holds 500 million
    elements.
    """
    zero = {**deepspeed.get("zero_optimization", {}), "reduce_bucket_size": elements}
    return {**deepspeed, "zero_optimization": zero}


def run_steps(trainer: DraftTrainer, packs: Sequence[PackedSequence], count: int) -> None:
    """Optimizer steps on the same packs: the first creates the optimizer's state, later ones are alike."""
    for _ in range(count):
        trainer.step(packs)
