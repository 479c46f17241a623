"""Running the target on the ranks of a training job: ZeRO-3 shards its weights over all ranks, and each rank
runs its forward over the same spans that the draft trains on.

Legend: S slots of this rank, L tokens of a packed sequence, Ht hidden size, V vocabulary.
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
    attention_size,
    check_parallel,
    empty_target,
    load_full_config,
    load_target,
    resolve_path,
    teacher_tokens,
)
from eagle3_ds.topology import Topology
from eagle3_ds.train.extensions import prepare_extensions
from eagle3_ds.train.quiet import ignore_renamed_collectives

PROBE_LENGTHS = (37, 11)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""By dtype, the largest relative error of the probe's median row that rounding explains. A wrong mask or
position gives an error around 1.
"""


@dataclass(frozen=True)
class SpanStates:
    """The target's hidden states at this rank's slots, padding slots included, on this rank's device.

    Attributes:
        plan: the cut of the packed sequence, the same on all ranks of the sp group.
        slots: int64 [S], this rank's slots in the order of the plan, padding last.
        aux: [S, layers * Ht], the inputs of the captured layers, concatenated.
        teacher: [S, Ht], the output after the final norm.
        teacher_token: int64 [S], the target's argmax.
    """

    plan: SpanPlan
    slots: np.ndarray
    aux: Tensor
    teacher: Tensor
    teacher_token: Tensor


class TargetEngine:
    """The frozen target. The constructor and `run` are collective over the world; the ranks of one sp group
    pass the same packed sequence.

    Raises:
        ValueError: the target cannot run over spans, or gives other hidden states then than in a plain
            forward.
    """

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        ignore_renamed_collectives()
        # Before the weights are sharded, which sets up DeepSpeed's communication already.
        prepare_extensions()
        self.recipe, self.topology = recipe, topology
        path = resolve_path(recipe.target.path)
        check_parallel(
            load_full_config(path), recipe.target.path, recipe.parallel.ulysses, recipe.data.max_length
        )
        target = _load_sharded(recipe.target, topology)
        self.dtype = getattr(torch, recipe.target.dtype)
        self.vocab_size: int = target.config.vocab_size
        self.kernel = checked_kernel(
            recipe.attention.kernel, topology.device, self.dtype, attention_size(target.config)
        )
        self._head: nn.Parameter = target.model.get_output_embeddings().weight
        self._forward: Any = _hook_up(SpanForward(target), topology)
        self._probe()

    @torch.no_grad()
    def run(self, token_ids: Tensor, lengths: Sequence[int], plan: SpanPlan | None = None) -> SpanStates:
        """Run the target over this rank's spans of a packed sequence. Collective over the world: ZeRO-3
        gathers the weights of each layer.

        Args:
            token_ids: int64 [L], whole on every rank of the sp group: all documents laid end to end.
            lengths: the tokens of each document.
            plan: the cut of these documents; None balances all slots, live or not.
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
        """Compare the hidden states of two short packed documents with those of rank 0's plain forward of
        each document in transformers. Collective.

        Raises:
            ValueError: they differ by more than rounding.
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
    """The target with its decoder and head partitioned over the world. Collective.

    Rank 0 alone reads the weights, into host memory. Each decoder layer is then partitioned by itself, and
    last the rest, embedding and head: a device holds at most one layer whole, or that rest.
    """
    if topology.world_group is None:
        return load_target(section, device=topology.device)
    reads = topology.place.rank == 0
    target = load_target(section) if reads else empty_target(section)
    used = nn.ModuleList([target.base, target.model.get_output_embeddings()])
    dtypes: list[Any] = [{name: tensor.dtype for name, tensor in _tensors(used)}]
    dist.broadcast_object_list(dtypes, src=0, device=topology.device)
    for name, tensor in _tensors(used):
        # Some families keep a few modules in fp32, but only where weights are read, as on rank 0. The
        # broadcast of `zero.Init` needs the same dtypes on all ranks.
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
    """Broadcast rank 0's buffers to all devices; ZeRO-3 does this for parameters only. Collective."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                value = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                dist.broadcast(value, src=0)
                module._buffers[name] = value


def _hook_up(forward: SpanForward, topology: Topology) -> Any:
    """Wrap the forward in a DeepSpeed engine, which gathers each layer's weights just before they are used.

    An MLP runs in tiles; as a leaf module its weights are gathered once for all of them. Collective.
    """
    if topology.world_group is None:
        return forward
    mlps = {type(layer.mlp) for layer in forward.decoder.layers if hasattr(layer, "mlp")}
    if mlps:
        set_z3_leaf_modules(forward, list(mlps))
    engine, *_ = deepspeed.initialize(model=forward, config=_settings())
    engine.eval()
    return engine


def _settings() -> dict[str, Any]:
    """DeepSpeed settings for frozen weights. They have no bf16 or fp16 section, so that DeepSpeed keeps the
    dtypes of the weights.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
