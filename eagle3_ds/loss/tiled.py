"""Tiled soft cross entropy over all TTT steps at once.

A tile is a few columns of this rank. The teacher is projected once per tile and read by all K steps (step k reads it one
row further than step k - 1), and the gradient is formed in the forward pass, while the logits are at hand. So no
tensor of slots x vocabulary exists beyond one tile, and the head is used once per optimizer micro-batch, which is one
parameter gather under ZeRO-3 instead of K.

Legend: S slots, E rows of the extended buffers, K TTT steps, H hidden size, Vd draft vocabulary, t rows of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads beside the student; constants all.

    Attributes:
        row: int64 [S], each slot's row in the extended buffers; step k reads row + 1 + k. Ascending.
        teacher: [E, Ht], the target's last hidden states; teacher_head: [Vd, Ht], its head, rows of the draft vocabulary.
        teacher_token: int64 [E], the target's full-vocabulary argmax.
        draft_to_target: int64 [Vd].
        in_vocabulary: bool [E], the teacher's token lies in the draft vocabulary.
        supervised: bool [K, S].
        step_weight: fp32 [K], decay**k / N_k (0 when no slot of the step is supervised).
        tile_bytes: budget of one tile's transient logits.
    """

    row: Tensor
    teacher: Tensor
    teacher_head: Tensor
    teacher_token: Tensor
    draft_to_target: Tensor
    in_vocabulary: Tensor
    supervised: Tensor
    step_weight: Tensor
    tile_bytes: int


class LossSum(NamedTuple):
    """This rank's share of the loss and of what is reported, sums over its slots. All but `total` carry no gradient.

    A tuple, because DeepSpeed hooks the tensors of a module's output and does not look into dataclasses.

    Attributes:
        total: scalar, sum over k of step_weight[k] * step_loss[k].
        step_loss: fp32 [K], cross entropy summed over supervised slots in the vocabulary.
        hits, counts: fp32 [K], slots whose draft argmax equals the teacher's token, and supervised slots.
        joint_hits, joint_counts: fp32 [K], the same for "at all steps up to k".
    """

    total: Tensor
    step_loss: Tensor
    hits: Tensor
    counts: Tensor
    joint_hits: Tensor
    joint_counts: Tensor


def tiled_soft_cross_entropy(students: list[Tensor], head_weight: Tensor, inputs: LossInputs) -> LossSum:
    """Loss of K steps.

    Args:
        students: K tensors [S, H], the normed draft outputs.
        head_weight: [Vd, H], trained.

    Raises:
        ValueError: the byte budget does not hold the logits of one slot.
    """
    total, step_loss, hits, joint_hits = _TiledLoss.apply(inputs, head_weight, *students)
    joint = inputs.supervised.cumprod(0)
    return LossSum(total, step_loss, hits, inputs.supervised.sum(1).float(), joint_hits, joint.sum(1).to(torch.float32))


def tile_columns(tile_bytes: int, vocabulary: int, ttt_steps: int, itemsize: int) -> int:
    """Slots per tile: teacher probabilities of t + K rows, and logits, log-probabilities and gradient of t rows.

    Raises:
        ValueError: the budget is too small for a tile of one slot.
    """
    per_row = vocabulary * itemsize
    columns = (tile_bytes - ttt_steps * 2 * per_row) // (6 * per_row)
    if columns < 1:
        raise ValueError(
            f"loss.tile_bytes = {tile_bytes} is too small for a tile of one slot with a draft vocabulary of {vocabulary} "
            f"and {ttt_steps} TTT steps: at least {(6 + 2 * ttt_steps) * per_row} bytes are needed."
        )
    return int(columns)


class _TiledLoss(torch.autograd.Function):
    """Forward: the loss, and d(total)/d(students, head) beside it. Backward: scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: LossInputs, head: Tensor, *students: Tensor) -> tuple[Tensor, ...]:
        steps, needs_grad = len(students), any(ctx.needs_input_grad)
        dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
        contributing = inputs.supervised & inputs.in_vocabulary[_read_rows(inputs.row, steps)]
        weight = contributing.to(dtype) * inputs.step_weight.to(dtype)[:, None]
        grads = [torch.zeros_like(student) for student in students] if needs_grad else []
        dhead = torch.zeros_like(head, dtype=dtype) if needs_grad else head.new_zeros(())
        step_loss, hits, joint_hits = (torch.zeros(steps, dtype=dtype, device=head.device) for _ in range(3))
        # Only columns that some step supervises cost anything. K and the tile size do not depend on them, and no
        # collective runs in here, so ranks may differ in their number of tiles.
        columns = contributing.any(0).nonzero().squeeze(1)
        size = tile_columns(inputs.tile_bytes, len(head), steps, torch.finfo(dtype).bits // 8)
        for tile in columns.split(size):
            probability, projected = _teacher_tile(inputs, tile, steps, dtype)
            all_right = torch.ones(len(tile), dtype=torch.bool, device=head.device)
            for k, student in enumerate(students):
                rows = inputs.row[tile] + 1 + k
                target = probability[torch.searchsorted(projected, rows)]
                x = student[tile]
                log_student = (x @ head.T).to(dtype).log_softmax(-1)
                entropy = -(target * log_student).sum(-1)
                step_loss[k] += (entropy * contributing[k, tile]).sum()
                right = inputs.draft_to_target[log_student.argmax(-1)] == inputs.teacher_token[rows]
                right &= inputs.supervised[k, tile]
                all_right &= right
                hits[k] += right.sum()
                joint_hits[k] += all_right.sum()
                if needs_grad:
                    dlogits = ((log_student.exp_() - target) * weight[k, tile, None]).to(head.dtype)
                    grads[k][tile] = dlogits @ head
                    dhead += dlogits.T @ x
        ctx.save_for_backward(dhead, *grads)
        ctx.head_dtype = head.dtype
        total = (step_loss * inputs.step_weight.to(dtype)).sum()
        ctx.mark_non_differentiable(step_loss, hits, joint_hits)
        return total, step_loss, hits, joint_hits

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhead, *grads = ctx.saved_tensors
        return None, (dhead * dtotal).to(ctx.head_dtype), *(grad * dtotal.to(grad.dtype) for grad in grads)


def _read_rows(row: Tensor, steps: int) -> Tensor:
    """Rows that slot s reads at step k, int64 [K, S]."""
    return row[None, :] + 1 + torch.arange(steps, device=row.device)[:, None]


def _teacher_tile(inputs: LossInputs, tile: Tensor, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Teacher probabilities [R, Vd] of the R rows that the tile's columns read at any step, and these rows, ascending.

    Neighbouring columns read the same rows at different steps, so R is near t + K, not t * K.
    """
    rows = torch.unique(_read_rows(inputs.row[tile], steps))
    logits = (inputs.teacher[rows].to(inputs.teacher_head.dtype) @ inputs.teacher_head.T).to(dtype)
    return logits.softmax(-1), rows
