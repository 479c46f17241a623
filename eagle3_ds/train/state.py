"""Reading and writing the training state of a DeepSpeed engine at any ZeRO stage.

A *master* is an fp32 tensor that torch's AdamW steps; its two moments have the same layout. A *fragment* is a
run of consecutive elements of one flattened parameter, together with where they lie in a master. What one
master holds depends on the ZeRO stage:

- stage 0: one whole parameter;
- stages 1 and 2: this rank's partition of all parameters of a param group, laid end to end;
- stage 3: this rank's partition of each parameter of a sub-group, laid end to end.

`find_masters` lists the fragments of each master, so that no other code depends on the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from eagle3_ds.checkpoint.format import MASTER, MOMENTS, Fragment
from eagle3_ds.checkpoint.state import FlatMaster
from eagle3_ds.config import Recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.topology import Topology


class Trained(Protocol):
    """What `EngineState` needs of a trainer."""

    engine: Any
    recipe: Recipe
    topology: Topology
    vocabulary: VocabularyMap


class EngineState:
    """The `checkpoint.state.TrainingState` of a trainer's DeepSpeed engine.

    Raises:
        ValueError: DeepSpeed chose an optimizer whose layout `find_masters` does not know.
    """

    def __init__(self, trainer: Trained) -> None:
        self._engine: Any = trainer.engine
        self.recipe, self.topology, self.vocabulary = trainer.recipe, trainer.topology, trainer.vocabulary
        self.masters = find_masters(trainer.engine)

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def replica(self) -> tuple[int, int]:
        """(index, count): `count` ranks hold an equal copy of this rank's masters, and this is number
        `index` of them.
        """
        topology = self.topology
        if self.zero_stage == 0:
            return topology.place.rank, topology.mesh.world_size
        return (
            (topology.sp_rank, topology.sp_world_size)
            if self.recipe.parallel.zero_group == "draft_dp"
            else (0, 1)
        )

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes by parameter name; ZeRO-3 keeps them in `ds_shape`."""
        named = _named(self._engine.module)
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}

    @property
    def adam_steps(self) -> int:
        state = self._engine.basic_optimizer.state
        (steps,) = {
            int(state[master.tensor]["step"]) if master.tensor in state else 0 for master in self.masters
        }
        return steps

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    @property
    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}

    def read(self, master: FlatMaster) -> dict[str, Tensor]:
        """Views of a master and its moments, by kind, each fp32 [n]: the elements that this rank holds.
        Before AdamW's first step the moments are new tensors of zeros.
        """
        state = self._engine.basic_optimizer.state.get(master.tensor, {})
        flat = {MASTER: master.tensor.detach().view(-1)}
        return flat | {
            kind: state[kind].view(-1) if state else torch.zeros_like(flat[MASTER]) for kind in MOMENTS
        }

    @torch.no_grad()
    def write(self, adam_steps: int, read: Callable[[str, Fragment], Tensor]) -> None:
        """Fill this rank's masters and moments, then copy the masters into the weights. Collective: ZeRO
        gathers the updated weights.

        Args:
            adam_steps: the updates that AdamW has made.
            read: returns the elements of a fragment, fp32 [fragment.numel], of the kind given.
        """
        for master in self.masters:
            state = self._engine.basic_optimizer.state[master.tensor]
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(master.tensor))
            state["step"] = torch.tensor(float(adam_steps))
            for kind, flat in self.read(master).items():
                for fragment in master.fragments:
                    fragment.of(flat).copy_(read(kind, fragment))
        _weights_from_masters(self._engine.optimizer)

    def count_steps(self, steps: int, skipped_steps: int) -> None:
        """Set the counters that the DeepSpeed engine keeps besides the optimizer's state."""
        engine = self._engine
        engine.global_steps, engine.skipped_steps = steps, skipped_steps
        engine.micro_steps = steps * engine.gradient_accumulation_steps()
        engine.global_samples = steps * engine.train_batch_size()


def find_masters(engine: Any) -> list[FlatMaster]:
    """The masters that this rank holds. The masters of all ranks that ZeRO shards over hold every element of
    every parameter exactly once.

    Raises:
        ValueError: DeepSpeed chose an optimizer of another type than those known here.
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
            f"DeepSpeed chose {type(wrapper).__name__}, whose state this program cannot save. Use a "
            "DeepSpeed JSON with the keys of those in ds_configs/."
        )
    return [
        FlatMaster(master_of[parameter], (Fragment(name, 0, 0, parameter.numel()),))
        for name, parameter in _named(engine.module)
    ]


def _of_stage_1_or_2(wrapper: Any, module: nn.Module) -> list[FlatMaster]:
    fragments: list[list[Fragment]] = [[] for _ in wrapper.single_partition_of_fp32_groups]
    for name, parameter in _named(module):
        mapping = parameter._hp_mapping
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragments[mapping.param_group_index].append(Fragment(name, low.start, high.start, high.numel))
    return [
        FlatMaster(*pair)
        for pair in zip(wrapper.single_partition_of_fp32_groups, map(tuple, fragments), strict=True)
    ]


def _of_stage_3(wrapper: Any, module: nn.Module) -> list[FlatMaster]:
    fragments: list[list[Fragment]] = [[] for _ in wrapper.fp32_partitioned_groups_flat]
    for name, parameter in _named(module):
        group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = numel * parameter.ds_zero_partition_rank
        # ZeRO-3 pads a parameter to equal partitions: the last ones hold some padding, or nothing else.
        numel = min(numel, parameter.ds_numel - start)
        if numel > 0:
            fragments[group].append(Fragment(name, start, offset, numel))
    return [
        FlatMaster(*pair)
        for pair in zip(wrapper.fp32_partitioned_groups_flat, map(tuple, fragments), strict=True)
    ]


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the draft, parameter) for every parameter of the engine's module."""
    return ((name.removeprefix("draft."), parameter) for name, parameter in module.named_parameters())


def _weights_from_masters(wrapper: Any) -> None:
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        wrapper.checkpoint_event_prologue()
        for weights, master in zip(
            wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True
        ):
            weights.data.copy_(master)
        # Gathers again the parameters that ZeRO-3 keeps whole on every rank, and drops ZeRO++'s secondary
        # copies, which still have the old weights.
        wrapper.checkpoint_event_epilogue()
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper.update_lp_params()
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
