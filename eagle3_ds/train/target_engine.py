"""The target in a training job: its weights sharded by ZeRO-3 over all ranks, its forward cut into the
draft's spans.

Legend: S slots of this rank, L tokens, Ht hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from eagle3_ds.attention import PackedAttention
from eagle3_ds.config import Recipe, TargetSection
from eagle3_ds.kernels import checked_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.targets import (
    SpanForward,
    Target,
    check_parallel,
    empty_target,
    head_size,
    load_full_config,
    load_target,
    resolve_path,
    teacher_tokens,
)
from eagle3_ds.topology import Topology
from eagle3_ds.train.quiet import ignore_renamed_collectives
from eagle3_ds.train.shared_memory import unname_segment

PROBE_LENGTHS = (37, 11)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""Largest relative error of the probe's median row. A wrong mask or position gives errors around 1."""


@dataclass(frozen=True)
class SpanStates:
    """What the target's forward leaves on one rank: the rows of its own slots, padding among them.

    Attributes:
        slots: int64 [S], in the order of the plan, padding last.
        aux: [S, layers * Ht]; teacher: [S, Ht]; teacher_token: int64 [S]; on this rank's device.
    """

    plan: SpanPlan
    slots: np.ndarray
    aux: Tensor
    teacher: Tensor
    teacher_token: Tensor


class TargetEngine:
    """The frozen target. Every method is collective over the world; sp peers pass the same sequence.

    Raises:
        ValueError: a target that cannot run over spans, or whose hidden states then differ from those of its
            plain forward.
    """

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        ignore_renamed_collectives()
        self.recipe, self.topology = recipe, topology
        path = resolve_path(recipe.target.path)
        check_parallel(
            load_full_config(path), recipe.target.path, recipe.parallel.ulysses, recipe.data.max_length
        )
        target = _load_sharded(recipe.target, topology)
        self.dtype = getattr(torch, recipe.target.dtype)
        self.vocab_size: int = target.config.vocab_size
        self.kernel = checked_kernel(
            recipe.attention.kernel, topology.device, self.dtype, head_size(target.config)
        )
        self._head: nn.Parameter = target.model.get_output_embeddings().weight
        self._forward: Any = _hook_up(SpanForward(target), topology)
        self._probe()

    @torch.no_grad()
    def run(self, token_ids: Tensor, lengths: Sequence[int], plan: SpanPlan | None = None) -> SpanStates:
        """Run over this rank's spans of a packed sequence.

        token_ids: int64 [L], whole, of all documents end to end. plan: of these documents; None cuts them
        alike all along.
        """
        parallel, place, device = self.recipe.parallel, self.topology.place, self.topology.device
        plan = plan or SpanPlan.make(lengths, parallel.ring, parallel.ulysses, parallel.chunks_per_rank)
        slots = plan.slots(place.ring_rank, place.ulysses_rank)
        padded = torch.zeros(plan.padded_length, dtype=torch.int64)
        padded[: plan.length] = token_ids
        packed = PackedAttention(
            plan, place.ring_rank, self.kernel, self.topology.ulysses_group, self.topology.ring_group
        )
        own = torch.from_numpy(slots)
        positions = torch.from_numpy(plan.position[slots])
        aux, teacher = self._forward(padded[own].to(device), positions.to(device), packed)
        with deepspeed.zero.GatheredParameters([self._head], enabled=hasattr(self._head, "ds_id")):
            tokens = teacher_tokens(teacher, self._head)
        return SpanStates(plan, slots, aux, teacher, tokens)

    def _probe(self) -> None:
        """Hold two short documents, cut and packed, against each one's forward as transformers computes it on
        rank 0.
        """
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(self.vocab_size, (sum(PROBE_LENGTHS),), generator=generator)
        states = self.run(token_ids, PROBE_LENGTHS)
        with torch.no_grad():
            documents = token_ids.to(self.topology.device).split(list(PROBE_LENGTHS))
            plain = [self._forward(ids, torch.arange(len(ids), device=ids.device)) for ids in documents]
        own = torch.from_numpy(states.slots[states.slots < len(token_ids)]).to(self.topology.device)
        worst = torch.zeros(1, device=self.topology.device)
        for found, parts in zip((states.aux, states.teacher), zip(*plain, strict=True), strict=True):
            expected = torch.cat(parts)
            if self.topology.world_group is not None:
                dist.broadcast(expected, src=0)
            difference = (found[: len(own)] - expected[own]).float().norm(dim=-1) / expected[
                own
            ].float().norm(dim=-1)
            if len(own):
                worst = worst.maximum(difference.nan_to_num(torch.inf).median())
        if self.topology.world_group is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        if not float(worst) <= TOLERANCE[self.dtype]:
            raise ValueError(
                f"target.path = {self.recipe.target.path!r}: cut over ranks and packed, its hidden states "
                f"differ from those of its plain forward by {float(worst):.1e} (at most "
                f"{TOLERANCE[self.dtype]:.0e} is rounding), so it mixes tokens in a way that is not known "
                "here. Capture it with target.capture: single."
            )


def _load_sharded(section: TargetSection, topology: Topology) -> Target:
    """The target with its decoder and head partitioned over the world. Rank 0 alone reads them, into its host
    memory.

    One decoder layer is partitioned at a time, the embedding and the head last: a device never holds more
    than the larger of the two whole.
    """
    if topology.world_group is None:
        return load_target(section, device=topology.device)
    reads = topology.place.rank == 0
    target = load_target(section) if reads else empty_target(section)
    used = nn.ModuleList([target.base, target.model.get_output_embeddings()])
    dtypes: list[Any] = [{name: tensor.dtype for name, tensor in _tensors(used)}]
    dist.broadcast_object_list(dtypes, src=0, device=topology.device)
    for name, tensor in _tensors(used):
        # A few modules of some families are kept in fp32 when weights are read, and only then.
        tensor.data = tensor.data.to(dtypes[0][name])
    for block in (*target.base.layers, used):
        for module in block.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=topology.device, recurse=False)
        if block is used:
            target.model.tie_weights()
        deepspeed.zero.Init(
            module=block, config_dict_or_path=_settings()
        )  # broadcasts from rank 0, then partitions
    _share_buffers(used, topology.device)  # last: `to_empty` empties them too
    return target


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _share_buffers(model: nn.Module, device: torch.device) -> None:
    """Everybody gets rank 0's buffers, on the device: ZeRO-3 looks after parameters only."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                value = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                dist.broadcast(value, src=0)
                module._buffers[name] = value


def _hook_up(forward: SpanForward, topology: Topology) -> Any:
    """DeepSpeed fetches each layer's parameters when its turn comes, an MLP's at once for all its tiles."""
    if topology.world_group is None:
        return forward
    mlps = {type(layer.mlp) for layer in forward.decoder.layers if hasattr(layer, "mlp")}
    if mlps:
        set_z3_leaf_modules(forward, list(mlps))
    engine, *_ = deepspeed.initialize(model=forward, config=_settings())
    unname_segment(topology)
    engine.eval()
    return engine


def _settings() -> dict[str, Any]:
    """ZeRO-3 for parameters that never change; without a precision section DeepSpeed leaves their dtypes
    alone.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
