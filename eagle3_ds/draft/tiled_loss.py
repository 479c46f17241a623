"""The loss of all K guesses at once, tile by tile; what it is of a guess is the business of a `TileLoss`.

A tile is a few columns of this rank. The teacher is projected once per tile and read by all K steps (step k
reads it one row further than step k - 1), and the gradient is formed in the forward pass, while the logits
are at hand. So no tensor of slots x vocabulary exists beyond one tile, and the head is used once per
micro-batch. The draft's final norm is applied here too, tile by tile.

Legend: Q live slots of this rank, E rows of the extended buffers, K TTT steps, H hidden size, Ht the
target's, Vd draft vocabulary, t columns and R teacher rows of one tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eagle3_ds.draft.taps import LossTaps
from eagle3_ds.draft.tile_loss import TileLoss

IntArray = NDArray[np.int64]


class LossTile(NamedTuple):
    """Some columns, and what they read; computed on the host, so that no device is waited for.

    Attributes:
        columns: int64 [t], ascending; rows: int64 [R], the rows of the extended buffers that they read at any
            step, ascending.
        place: int64 [K, t], where in `rows` each column reads at each step.
        starts: per step, `place[k]` as the start of a run of t, or None where it is not one.
    """

    columns: IntArray
    rows: IntArray
    place: IntArray
    starts: tuple[int | None, ...]


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads beside the student; constants all, on the device but for the tiles.

    Attributes:
        tiles: the columns that some step supervises, cut by `loss_tiles`.
        teacher: the rows [R, Ht] of each tile, the target's last hidden states, on the device and in the
            head's dtype.
        teacher_head: [Vd, Ht], the target's head, rows of the draft vocabulary.
        teacher_token: int64 [E], the target's full-vocabulary argmax.
        draft_to_target: int64 [Vd].
        contributing: bool [K, Q], supervised, and the teacher's token lies in the draft vocabulary.
        supervised: bool [K, Q].
        step_weight: fp32 [K], decay**k / N_k (0 when no slot of the step is supervised).
        eps: of the final norm.
        loss: of one guess.
    """

    tiles: Sequence[LossTile]
    teacher: Iterable[Tensor]
    teacher_head: Tensor
    teacher_token: Tensor
    draft_to_target: Tensor
    contributing: Tensor
    supervised: Tensor
    step_weight: Tensor
    eps: float
    loss: TileLoss


class LossSum(NamedTuple):
    """This rank's share of the loss and of what is reported, sums over its slots. All but `total` carry no
    gradient.

    A tuple, because DeepSpeed hooks the tensors of a module's output and does not look into dataclasses.

    Attributes:
        total: scalar, sum over k of step_weight[k] * step_loss[k].
        step_loss: fp32 [K], the loss summed over supervised slots in the vocabulary.
        hits, counts: fp32 [K], slots whose draft argmax equals the teacher's token, and supervised slots.
        joint_hits, joint_counts: fp32 [K], the same for "at all steps up to k".
        acceptance: fp32 [K], the chance that a server which samples accepts the guess, summed over supervised
            slots; nil where the teacher's token is out of the draft vocabulary.
        joint_acceptance: fp32 [K], the same for all guesses up to k.
    """

    total: Tensor
    step_loss: Tensor
    hits: Tensor
    counts: Tensor
    joint_hits: Tensor
    joint_counts: Tensor
    acceptance: Tensor
    joint_acceptance: Tensor


def tiled_loss(taps: LossTaps, norm_weight: Tensor, head_weight: Tensor, inputs: LossInputs) -> LossSum:
    """Loss of the K steps in `taps`.

    Args:
        norm_weight: [H], the draft's final norm; head_weight: [Vd, H]. Trained, both.
    """
    total, *sums = _TiledLoss.apply(inputs, taps, norm_weight, head_weight, *taps.tickets)
    step_loss, hits, joint_hits, acceptance, joint_acceptance = sums
    # The tickets hold the graph, which holds the taps: a cycle that no collector sees, and that would outlive
    # the step.
    taps.hidden.clear()
    taps.tickets.clear()
    counts, joint_counts = inputs.supervised.sum(1).float(), inputs.supervised.cumprod(0).sum(1).float()
    return LossSum(total, step_loss, hits, counts, joint_hits, joint_counts, acceptance, joint_acceptance)


def loss_tiles(
    row: IntArray, supervised: NDArray[np.bool_], tile_bytes: int, vocabulary: int, itemsize: int
) -> list[LossTile]:
    """Cut the columns that some step supervises into tiles whose transient logits fit a byte budget.

    A tile holds the teacher's probabilities of its R rows, R at most t + K where columns are neighbours, and
    logits, target and gradient of t columns. K and the tiles may differ between ranks: no collective runs
    among them.

    Args:
        row: int64 [Q], each slot's row in the extended buffers; step k reads row + 1 + k. Ascending.
        supervised: bool [K, Q]. Columns that only miss the draft vocabulary count too: accuracy looks at
            them.
        vocabulary: Vd. itemsize: bytes of the trained weights' dtype.

    Raises:
        ValueError: the budget is too small for a tile of one slot.
    """
    steps = len(supervised)
    check_tile_bytes(tile_bytes, vocabulary, steps, itemsize)
    per_row, per_column = _row_and_column_bytes(vocabulary, itemsize)
    columns = np.flatnonzero(supervised.any(0))
    ahead = 1 + np.arange(steps)[:, None]
    tiles: list[LossTile] = []
    start = 0
    while start < len(columns):
        # Scattered columns read more rows each: take as many as fit, at least one.
        size = max(1, (tile_bytes - (steps - 1) * per_row) // (per_row + per_column))
        while True:
            chosen = columns[start : start + size]
            reads = row[chosen] + ahead
            rows = np.unique(reads)
            if len(rows) * per_row + len(chosen) * per_column <= tile_bytes or len(chosen) == 1:
                break
            size = max(
                1, int(len(chosen) * tile_bytes / (len(rows) * per_row + len(chosen) * per_column) * 0.95)
            )
        place = np.searchsorted(rows, reads)
        runs = (np.diff(place, axis=1) == 1).all(1)
        starts = tuple(int(first) if run else None for first, run in zip(place[:, 0], runs, strict=True))
        tiles.append(LossTile(chosen, rows, place, starts))
        start += len(chosen)
    return tiles


def check_tile_bytes(tile_bytes: int, vocabulary: int, steps: int, itemsize: int) -> None:
    """Raises ValueError when the budget does not hold a tile of one slot."""
    per_row, per_column = _row_and_column_bytes(vocabulary, itemsize)
    smallest = steps * per_row + per_column
    if tile_bytes < smallest:
        raise ValueError(
            f"loss.tile_bytes = {tile_bytes} is too small for a tile of one slot with a draft vocabulary of "
            f"{vocabulary} and {steps} TTT steps: at least {smallest} bytes are needed."
        )


def _row_and_column_bytes(vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Bytes of the teacher's logits and probabilities of a row, and of logits, target and gradient of a
    column.

    All fp32, but for the logits as the matmul gives them.
    """
    return vocabulary * (4 + 4 + itemsize), vocabulary * (4 + 4 + 4 + itemsize)


class _TiledLoss(torch.autograd.Function):
    """Forward: the loss, and beside it d(total)/d(hidden) left at the taps and d(total)/d(norm, head) kept.
    Backward: scales.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, taps: LossTaps, norm: Tensor, head: Tensor, *_tickets: Tensor
    ) -> tuple[Tensor, ...]:
        needs_grad = any(ctx.needs_input_grad)
        tally = _Tally(inputs, taps, norm.detach(), head.detach(), needs_grad)
        for tile, teacher in zip(inputs.tiles, inputs.teacher, strict=True):
            tally.add(tile, teacher)
        if needs_grad:
            taps.gradients = tally.gradients
            ctx.save_for_backward(tally.dnorm, tally.dhead)
        ctx.taps, ctx.steps, ctx.dtypes = taps, len(taps.hidden), (norm.dtype, head.dtype)
        total = (tally.step_loss * inputs.step_weight.to(tally.step_loss.dtype)).sum()
        reported = (tally.step_loss, tally.hits, tally.joint_hits, tally.acceptance, tally.joint_acceptance)
        ctx.mark_non_differentiable(*reported)
        return total, *reported

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dnorm, dhead = ctx.saved_tensors
        ctx.taps.scale = dtotal
        norm_dtype, head_dtype = ctx.dtypes
        tickets = [dtotal.new_zeros(())] * ctx.steps
        return None, None, (dnorm * dtotal).to(norm_dtype), (dhead * dtotal).to(head_dtype), *tickets


class _Tally:
    """The running sums over tiles.

    `gradients` holds, per step, all columns of the tiles and the gradient at them: one buffer each, filled as
    the tiles come.
    """

    def __init__(
        self, inputs: LossInputs, taps: LossTaps, norm: Tensor, head: Tensor, needs_grad: bool
    ) -> None:
        self.inputs, self.hidden, self.norm, self.head, self.needs_grad = (
            inputs,
            taps.hidden,
            norm,
            head,
            needs_grad,
        )
        self.dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
        steps, device = len(self.hidden), head.device
        self.step_loss, self.hits, self.joint_hits, self.acceptance, self.joint_acceptance = (
            torch.zeros(steps, dtype=self.dtype, device=device) for _ in range(5)
        )
        self.weight = inputs.contributing.to(self.dtype) * inputs.step_weight.to(self.dtype)[:, None]
        self.done = 0
        if needs_grad:
            columns = np.concatenate([tile.columns for tile in inputs.tiles] or [np.empty(0, dtype=np.int64)])
            where = torch.from_numpy(columns).to(device)
            self.gradients = [(where, head.new_empty((len(where), head.shape[1]))) for _ in range(steps)]
            self.dnorm, self.dhead = (
                torch.zeros_like(norm, dtype=self.dtype),
                torch.zeros_like(head, dtype=self.dtype),
            )

    def add(self, tile: LossTile, teacher: Tensor) -> None:
        """teacher: [R, Ht], the tile's rows."""
        inputs, device = self.inputs, self.head.device
        columns = torch.from_numpy(tile.columns).to(device, non_blocking=True)
        tokens = inputs.teacher_token[torch.from_numpy(tile.rows).to(device, non_blocking=True)]
        probability = (teacher @ inputs.teacher_head.T).to(self.dtype).softmax(-1)
        all_right = torch.ones(len(columns), dtype=torch.bool, device=device)
        all_accepted = torch.ones(len(columns), dtype=self.dtype, device=device)
        for k, hidden in enumerate(self.hidden):
            target, token = _read(probability, tile, k), _read(tokens, tile, k)
            best, accepted = self._add_step(k, hidden[columns], target, columns)
            right = (inputs.draft_to_target[best] == token) & inputs.supervised[k, columns]
            all_right &= right
            all_accepted *= accepted
            self.hits[k] += right.sum()
            self.joint_hits[k] += all_right.sum()
            self.acceptance[k] += accepted.sum()
            self.joint_acceptance[k] += all_accepted.sum()
        self.done += len(columns)

    def _add_step(self, k: int, hidden: Tensor, target: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """One guess of one tile: hidden [t, H], target [t, Vd].

        Returns the student's argmax, int64 [t], and the chance that it is accepted, [t], nil outside the
        loss.
        """
        with torch.enable_grad():
            leaves = (hidden.requires_grad_(), self.norm.detach().requires_grad_())
            normed = functional.rms_norm(hidden, (hidden.shape[-1],), leaves[1], self.inputs.eps)
        x = normed.detach()
        logits = (x @ self.head.T).to(self.dtype)
        best = logits.argmax(-1)
        terms = self.inputs.loss(logits, target)
        contributing = self.inputs.contributing[k, columns]
        self.step_loss[k] += torch.where(contributing, terms.value, 0.0).sum()
        if self.needs_grad:
            dlogits = terms.dlogits.mul_(self.weight[k, columns, None]).to(self.head.dtype)
            if self.dhead.dtype == dlogits.dtype:
                self.dhead.addmm_(dlogits.T, x)
            else:
                self.dhead.add_(dlogits.T @ x)
            dhidden, dnorm = torch.autograd.grad(normed, leaves, dlogits @ self.head)
            self.gradients[k][1][self.done : self.done + len(columns)] = dhidden
            self.dnorm += dnorm
        return best, torch.where(contributing, terms.acceptance, 0.0)


def _read(rows: Tensor, tile: LossTile, step: int) -> Tensor:
    """What the tile's columns read of [R, ...] at a step: a view where they are neighbours."""
    start = tile.starts[step]
    if start is not None:
        return rows[start : start + len(tile.columns)]
    return rows[torch.from_numpy(tile.place[step]).to(rows.device)]
