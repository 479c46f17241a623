"""Where DeepSpeed keeps this rank's share of the training state, at every ZeRO stage, as pieces of whole parameters.

torch's AdamW steps fp32 tensors, the *masters*, and keeps two moments of each in the same layout. What a master is depends on
the stage: one whole parameter (stage 0), this rank's part of all parameters laid end to end (1 and 2), or its parts of some of
them (3). `find_shards` says which elements of which parameter lie where, and nothing else needs to know the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from eagle3_ds.train.checkpoint import MASTER, MOMENTS, Piece


@dataclass(frozen=True)
class Shard:
    """A master, the very tensor that AdamW steps and keys its state by, and the pieces of parameters in it."""

    master: Tensor
    pieces: tuple[Piece, ...]


def find_shards(engine: Any) -> list[Shard]:
    """This rank's masters. Together, the ranks that ZeRO shards over hold every parameter exactly once.

    Raises:
        ValueError: DeepSpeed chose an optimizer whose layout is not known here.
    """
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return _of_stage_3(wrapper, engine.module)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return _of_stage_1_or_2(wrapper, engine.module)
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        master_of = {parameter: master for group in groups for parameter, master in zip(*group, strict=True)}
    elif isinstance(wrapper, torch.optim.AdamW):
        master_of = {parameter: parameter for parameter in engine.module.parameters()}
    else:
        raise ValueError(
            f"DeepSpeed chose {type(wrapper).__name__}, whose state this program cannot save. Use a DeepSpeed JSON with the "
            "keys of those in ds_configs/."
        )
    return [Shard(master_of[parameter], (Piece(name, 0, 0, parameter.numel()),)) for name, parameter in _named(engine.module)]


def _of_stage_1_or_2(wrapper: Any, module: nn.Module) -> list[Shard]:
    pieces: list[list[Piece]] = [[] for _ in wrapper.single_partition_of_fp32_groups]
    for name, parameter in _named(module):
        mapping = parameter._hp_mapping
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces[mapping.param_group_index].append(Piece(name, low.start, high.start, high.numel))
    return [Shard(*pair) for pair in zip(wrapper.single_partition_of_fp32_groups, map(tuple, pieces), strict=True)]


def _of_stage_3(wrapper: Any, module: nn.Module) -> list[Shard]:
    pieces: list[list[Piece]] = [[] for _ in wrapper.fp32_partitioned_groups_flat]
    for name, parameter in _named(module):
        group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = numel * parameter.ds_zero_partition_rank
        # The last partitions are padded, some may be padding alone.
        numel = min(numel, parameter.ds_numel - start)
        if numel > 0:
            pieces[group].append(Piece(name, start, offset, numel))
    return [Shard(*pair) for pair in zip(wrapper.fp32_partitioned_groups_flat, map(tuple, pieces), strict=True)]


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters by the names of `DraftModel`."""
    return ((name.removeprefix("draft."), parameter) for name, parameter in module.named_parameters())


def shares(shards: list[Shard], index: int, count: int) -> list[Shard]:
    """The `index`-th of `count` equal cuts of every piece."""
    cuts = ([piece.share(index, count) for piece in shard.pieces] for shard in shards)
    return [Shard(shard.master, tuple(cut for cut in own if cut.numel)) for shard, own in zip(shards, cuts, strict=True)]


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name. A parameter that ZeRO-3 has taken apart remembers its own."""
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _named(module)}


def read_state(engine: Any, shard: Shard) -> dict[str, Tensor]:
    """The flat master and moments of a shard: views. Moments are zeros before AdamW's first step."""
    state = engine.basic_optimizer.state.get(shard.master, {})
    flat = {MASTER: shard.master.detach().view(-1)}
    return flat | {kind: state[kind].view(-1) if state else torch.zeros_like(flat[MASTER]) for kind in MOMENTS}


def adam_steps(engine: Any, shards: list[Shard]) -> int:
    """Updates that AdamW has made, which its bias correction depends on."""
    state = engine.basic_optimizer.state
    (steps,) = {int(state[shard.master]["step"]) if shard.master in state else 0 for shard in shards}
    return steps


@torch.no_grad()
def write_state(engine: Any, shards: list[Shard], steps: int, read: Callable[[str, Piece], Tensor]) -> None:
    """Fill masters and moments from `read(kind, piece)`, fp32 [numel], then the weights from the masters. Collective."""
    for shard in shards:
        state = engine.basic_optimizer.state[shard.master]
        for kind in MOMENTS:
            state.setdefault(kind, torch.zeros_like(shard.master))
        state["step"] = torch.tensor(float(steps))
        for kind, flat in read_state(engine, shard).items():
            for piece in shard.pieces:
                piece.of(flat).copy_(read(kind, piece))
    _weights_from_masters(engine.optimizer)


def _weights_from_masters(wrapper: Any) -> None:
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        wrapper.checkpoint_event_prologue()
        for weights, master in zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True):
            weights.data.copy_(master)
        # Gathers again what every rank holds whole, and forgets ZeRO++'s secondary copies.
        wrapper.checkpoint_event_epilogue()
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper.update_lp_params()
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
