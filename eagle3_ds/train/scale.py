"""Is the gradient that DeepSpeed holds at its scale? Asked once, in a trainer's first telling optimizer step.

DeepSpeed averages gradients by a number that depends on its version, on the ZeRO stage and on how groups are
declared (see `engine`). With another number the draft would train wrongly in silence: Adam hides a wrong
scale, clipping does not. So for one small parameter the gradient before the step is compared with what the
backwards of all ranks add up to.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from eagle3_ds.parts import EXCHANGE, marked

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the two gradients may lie apart, as a share of the wanted one, by `train.dtype`: some thirty
roundings of bfloat16 (2**-9), ten thousand of float32. Numbers of ranks that could be taken for one another
differ by a factor of two or more, which puts the gradients apart by a half at least."""
TELLING = 0.5
"""The least norm of the sum over the ranks, as a share of the root of the sum of their squared norms. Where
the gradients of the ranks cancel out more than that, what is left may be mostly rounding."""
_FIX = "Install the version of DeepSpeed in constraints.txt, and report this message as an issue."


class ScaleCheck:
    """Adds up what this rank's backwards give one parameter, until the comparison has been made.

    It must be made before other hooks are registered on the parameters, because hooks run in the order of
    their registration and later ones may sum gradients over ranks; and when the parameters are those that
    are trained, whole.

    Args:
        model: the whole model, the same on every rank.
        dtype: of training.
        zero_group: `parallel.zero_group`, for the message.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, zero_group: str) -> None:
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        # Of equally small ones the last: every supervised slot passes through a draft's last norm, and its
        # first parameters may be rows that only a mask reads.
        self._name, self._parameter = min(reversed(trained), key=lambda named: named[1].numel())
        self._bound, self._zero_group = BOUNDS[dtype], zero_group
        self._own: Tensor | None = None
        self._hook = self._parameter.register_hook(self._add)
        self.pending = True

    def _add(self, gradient: Tensor) -> None:
        flat = gradient.detach().reshape(-1)
        # The sum over the micro-batches is a copy: the gradient's memory is the engine's.
        self._own = flat.to(torch.float32, copy=True) if self._own is None else self._own + flat

    def stop(self) -> None:
        """Compare no more. Not collective, but all ranks must do the same."""
        self._hook.remove()
        self._own, self.pending = None, False

    @marked(EXCHANGE)
    def compare(self, engine: Any, loss_scale: float) -> None:
        """Compare, between the last backward of an optimizer step and the step itself. Collective over the
        world while `pending`, afterwards nothing: one all-reduce of twice the parameter's entries, and what
        `safe_get_full_grad` sends.

        A step tells nothing whose gradient is zero (no slot is supervised), not finite (the step is going to
        be skipped) or cancels out between ranks; the next one is compared then.

        Args:
            engine: DeepSpeed's, at the end of its accumulation.
            loss_scale: the factor that each rank's share of the loss was multiplied by.

        Raises:
            RuntimeError: the gradients differ. On all ranks or on none.
        """
        if not self.pending:
            return
        held = safe_get_full_grad(self._parameter)
        if held is None:
            raise RuntimeError(f"{self._where(engine)} gives no gradient before the step. {_FIX}")
        held = held.detach().to(torch.float32).reshape(-1)
        own = torch.zeros_like(held) if self._own is None else self._own / loss_scale
        self._own = None
        # What DeepSpeed holds travels too, so that all ranks judge the same numbers also where it has left
        # the ranks with different gradients.
        sent = torch.cat((own, held, own.square().sum()[None]))
        world = 1
        if dist.is_initialized():
            dist.all_reduce(sent)
            world = dist.get_world_size()
        sums = sent.double().cpu()
        wanted, found, power = sums[: len(own)], sums[len(own) : -1] / world, float(sums[-1])
        size = float(wanted.norm())
        if not sums.isfinite().all() or size <= TELLING * power**0.5:
            return
        apart = float((found - wanted).norm()) / size
        if apart > self._bound:
            raise RuntimeError(
                f"{self._where(engine)} holds {float(found.norm()) / size:.4g} times the gradient that the "
                f"backwards of all ranks add up to (relative difference {apart:.2g}, at most "
                f"{self._bound:g}): it averages over another number of ranks than eagle3_ds counts on, and "
                f"training would go wrong in silence. {_FIX}"
            )
        self.stop()

    def _where(self, engine: Any) -> str:
        return (
            f"DeepSpeed {deepspeed.__version__} (ZeRO stage {engine.zero_optimization_stage()}, "
            f"parallel.zero_group {self._zero_group}, parameter {self._name.removeprefix('draft.')})"
        )
