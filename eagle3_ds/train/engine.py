"""What DeepSpeed is handed, and how the gradient keeps its scale.

`zero_group: all`: DeepSpeed sees every rank as data parallel and averages over all W of them, so the loss
share is multiplied by W. `zero_group: draft_dp`: DeepSpeed sees draft_dp only, averages over it, and a hook
on each parameter sums the gradient over the sequence-parallel replicas first. Either way the result is the
sum of all ranks' shares, at every ZeRO stage.
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
from eagle3_ds.draft import Draft, LossInputs, LossSum, LossTaps, tiled_loss
from eagle3_ds.layout import LocalBatch
from eagle3_ds.topology import Topology, ZeroGroupMpu
from eagle3_ds.train.shared_memory import unname_segment


class DraftWithLoss(nn.Module):
    """The draft and its loss in one forward, so that DeepSpeed sees every use of every parameter."""

    def __init__(self, draft: Draft, embedding: Tensor, settings: Any) -> None:
        super().__init__()
        self.draft = draft
        # A plain attribute in a list, not a buffer: frozen, and none of DeepSpeed's business.
        self.frozen = [embedding]
        self.settings = settings

    def use_embedding(self, embedding: Tensor) -> None:
        """From now on; on the device and in the dtype of the one before."""
        self.frozen[0] = embedding

    def forward(self, batch: LocalBatch, inputs: LossInputs) -> LossSum:
        embedding, taps = self.frozen[0], LossTaps()
        finish = partial(tiled_loss, taps, inputs=inputs)
        # DeepSpeed reduces the gradients of a leaf module (see build_engine) once those of its inputs are
        # known. No other input has one.
        anchor = torch.zeros((), dtype=embedding.dtype, device=embedding.device, requires_grad=True)
        return LossSum(*self.draft(batch, embedding, self.settings, taps.add, finish, anchor))


def build_engine(
    recipe: Recipe, deepspeed_config: dict[str, Any], topology: Topology, model: DraftWithLoss
) -> tuple[Any, float]:
    """Initialise DeepSpeed.

    Returns:
        The engine, and the factor that each rank's share of the loss is multiplied by before backward.
    """
    by_draft_dp = recipe.parallel.zero_group == "draft_dp"
    if by_draft_dp and topology.sp_group is not None:
        for parameter in model.parameters():
            # A tensor hook sees each incoming gradient, so accumulation over micro-batches stays right.
            parameter.register_hook(partial(_sum_over_group, topology.sp_group))
    # One gather of the draft in forward and one in backward, where ZeRO-3 would else gather each matrix K
    # times.
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
    # DeepSpeed keeps the mpu of the last engine that had one for those that have none: a second trainer in
    # one process would reduce its gradients over the first one's groups.
    groups.mpu = mpu
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config, mpu=mpu)
    unname_segment(topology)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _undo_synthetic_step(engine.optimizer)
    return engine, float(topology.draft_dp if by_draft_dp else topology.mesh.world_size)


def _undo_synthetic_step(wrapper: FP16_UnfusedOptimizer) -> None:
    """Bring the optimizer of stage 0 in bf16 back to where it was before DeepSpeed stepped it.

    The wrapper takes a step on zero gradients to allocate the state (DeepSpeed 0.19.8,
    `initialize_optimizer_states`). Adam counts it, so that the bias correction makes the first real update
    1.4 times too small, and weight decay acts on the masters.
    """
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                master.copy_(parameter)


def _sum_over_group(group: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    summed = gradient.contiguous().clone()
    dist.all_reduce(summed, group=group)
    return summed


def step_and_norm(engine: Any) -> float:
    """Take the optimizer step of the last micro-batch; returns the global gradient norm before clipping.

    Where the norm is not finite, on any rank and so on all, nothing is updated. DeepSpeed's optimizers do so
    by themselves.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        engine.step()
        return float(engine.get_global_grad_norm())
    # DeepSpeed reports no norm for a plain fp32 optimizer (stage 0). Its gradients are reduced by now, and
    # whole.
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
    else:
        # AdamW passes over a parameter without a gradient: weights, moments and step count stay. DeepSpeed's
        # clipping, which comes before, does not bear that.
        hook = engine.optimizer.register_step_pre_hook(
            lambda optimizer, *_: optimizer.zero_grad(set_to_none=True)
        )
        engine.step()
        hook.remove()
    return norm


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, on the CPU, by its name in `model`. Under ZeRO-3 all ranks must call it."""
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole[name] = parameter.detach().to("cpu", copy=True)
    return whole
