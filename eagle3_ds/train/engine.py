"""Building the draft's DeepSpeed engine, and keeping the gradient at its scale.

Each rank computes its own share of the loss; the gradient wanted is the sum of all ranks' gradients, but
DeepSpeed averages over what it takes for data-parallel ranks. `parallel.zero_group` says which ranks those
are, and so which ranks ZeRO shards over:

- `all`: all W ranks of the world. DeepSpeed averages over W, so each share is multiplied by W.
- `draft_dp`: the ranks at the same place in different sequences. DeepSpeed averages over these, so each share
  is multiplied by draft_dp; a hook on each parameter first sums its gradient over the sp ranks, which hold
  replicas of it.

Both give the same gradient at every ZeRO stage. The first step asks whether the installed DeepSpeed keeps
to that (`scale`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from eagle3_ds.config import Recipe
from eagle3_ds.device.runtime import keeps_parameters
from eagle3_ds.draft import Draft, LossInputs, LossSum, LossTaps, tiled_loss
from eagle3_ds.layout import LocalBatch
from eagle3_ds.parts import EXCHANGE, OPTIMIZER, marked
from eagle3_ds.topology import Topology, ZeroGroupMpu
from eagle3_ds.train.extensions import prepare_extensions
from eagle3_ds.train.scale import ScaleCheck


class DraftWithLoss(nn.Module):
    """The draft and its loss in one forward, so that DeepSpeed sees every use of every parameter."""

    def __init__(self, draft: Draft, embedding: Tensor, settings: Any) -> None:
        super().__init__()
        self.draft = draft
        # In a list, so that nn.Module does not register it: DeepSpeed would broadcast, shard or cast it.
        self.frozen = [embedding]
        self.settings = settings

    def use_embedding(self, embedding: Tensor) -> None:
        """Use another embedding [V, H] from now on: whole, of the same device and dtype as the one before."""
        self.frozen[0] = embedding

    def forward(self, batch: LocalBatch, inputs: LossInputs) -> LossSum:
        """This rank's share of the loss and of the counts, summed over its live slots. Collective over the sp
        group: attention exchanges keys and values.
        """
        embedding, taps = self.frozen[0], LossTaps()
        finish = partial(tiled_loss, taps, inputs=inputs)
        # DeepSpeed starts reducing the gradients of a leaf module (see build_engine) when the gradients of
        # the module's inputs are computed. The draft's real inputs are frozen and have no gradients, so the
        # reduction would start before the backward has run. This input has one, and it is computed last.
        anchor = torch.zeros((), dtype=embedding.dtype, device=embedding.device, requires_grad=True)
        return LossSum(*self.draft(batch, embedding, self.settings, taps.add, finish, anchor))


def build_engine(
    recipe: Recipe, deepspeed_config: dict[str, Any], topology: Topology, model: DraftWithLoss
) -> tuple[Any, float, ScaleCheck]:
    """Initialise DeepSpeed. Collective over the world.

    Args:
        deepspeed_config: complete settings, as `fill_deepspeed_config` returns them.
        model: on every rank with the same whole fp32 weights.

    Returns:
        The engine, the factor that each rank's share of the loss is multiplied by before backward, and the
        check that DeepSpeed averages over that number.
    """
    by_draft_dp = recipe.parallel.zero_group == "draft_dp"
    if not keeps_parameters(topology.device):
        # DeepSpeed moves the model after hooks and optimizer were given its parameters, and these would keep
        # the ones that are trained no more.
        model.to(topology.device)
    scale_check = ScaleCheck(model, getattr(torch, recipe.train.dtype), recipe.parallel.zero_group)
    if by_draft_dp and topology.sp_group is not None:
        for parameter in model.parameters():
            # A tensor hook sees the gradient of one micro-batch, before it is added to `grad`: no
            # micro-batch is summed over the group twice.
            parameter.register_hook(partial(_sum_over_group, topology.sp_group))
    # As a leaf module the draft is gathered once in the forward and once in the backward. Without this,
    # ZeRO-3 gathers every matrix once per TTT step.
    set_z3_leaf_modules(model, [type(model.draft)])
    train = recipe.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
    )
    mpu = ZeroGroupMpu.create(topology) if by_draft_dp else None
    # DeepSpeed keeps the mpu in a global, and an engine without one takes what is there: a second trainer in
    # one process would reduce its gradients over the groups of the first.
    groups.mpu = mpu
    prepare_extensions()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config, mpu=mpu)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _undo_synthetic_step(engine.optimizer)
    return engine, float(topology.draft_dp if by_draft_dp else topology.mesh.world_size), scale_check


def _undo_synthetic_step(wrapper: FP16_UnfusedOptimizer) -> None:
    """Undo the step that DeepSpeed takes while it builds the stage-0 optimizer of a bf16 model.

    It steps on zero gradients to allocate the state (DeepSpeed 0.19.8, `initialize_optimizer_states`). Adam
    counts that step, so the bias correction makes the first real update 1.4 times too small, and the step
    applies weight decay to the fp32 master weights.
    """
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                master.copy_(parameter)


@marked(EXCHANGE)
def _sum_over_group(group: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    summed = gradient.contiguous().clone()
    dist.all_reduce(summed, group=group)
    return summed


@marked(OPTIMIZER)
def step_and_norm(engine: Any) -> float:
    """Take the optimizer step after the last micro-batch. Collective over the world.

    When the norm is not finite, which is so on all ranks or on none, weights and moments stay as they are.
    DeepSpeed's own optimizers already skip such a step; plain AdamW is made to skip it here.

    Returns:
        The norm of the whole gradient before clipping.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        engine.step()
        return float(engine.get_global_grad_norm())
    # Stage 0 in fp32: DeepSpeed steps AdamW itself and reports no norm. Every rank holds whole gradients
    # here, reduced already.
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
    else:
        # AdamW leaves a parameter without a gradient alone: its weights, moments and step count. The
        # gradients are dropped in a hook because DeepSpeed clips before it steps, and clipping fails on
        # parameters without gradients.
        hook = engine.optimizer.register_step_pre_hook(
            lambda optimizer, *_: optimizer.zero_grad(set_to_none=True)
        )
        engine.step()
        hook.remove()
    return norm


def full_parameters(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A CPU copy of every whole parameter, by its name in `model`. Collective under ZeRO-3, which gathers one
    parameter at a time.

    Args:
        keep: on this rank; others take part in the gathers and return nothing.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                whole[name] = parameter.detach().to("cpu", copy=True)
    return whole
