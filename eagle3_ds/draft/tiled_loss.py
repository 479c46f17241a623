"""The loss of all K guesses, tile by tile. A `TileLoss` says what the loss of one guess is.

A *tile* here is a set of t columns (live slots of this rank). The teacher's logits are computed once per tile
and read by all K steps; step k reads them one row further than step k - 1. Gradients are computed in the
forward pass, while the logits exist. So no tensor of slots x vocabulary exists beyond one tile.

With h_k the hidden states of step k at the tile's columns, c_k[i] = 1 where column i contributes at step k,
w_k = decay**k / N_k and p_k the teacher's probabilities, a tile adds to the loss and to the gradients

    x = norm(h_k)        z = x head^T        total += w_k sum_i c_k[i] loss(z_i, p_k[i])
    dz_i = w_k c_k[i] d(loss) / d(z_i)       d(head) += dz^T x
    dx = dz head         d(h_k), d(norm) from dx through the RMSNorm (decoder_backward.py)

The logits of one step exist at a time. dz of all K steps waits in the dtype of the head, so that d(head),
which is as large as the head and in fp32, is read and written once per tile.

These are gradients for d(total) = 1. Backward multiplies them by the gradient that arrives; d(h_k) waits at
the taps (taps.py) for that.

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

from eagle3_ds.draft.decoder_backward import NormTile, accumulate_product
from eagle3_ds.draft.taps import LossTaps
from eagle3_ds.draft.tile_loss import TileLoss, weighted_terms
from eagle3_ds.parts import LOSS, marked

IntArray = NDArray[np.int64]


class LossTile(NamedTuple):
    """The columns of one tile and the teacher rows that they read. It is made on the host from integers, so
    that no index is computed on the device and waited for.

    Attributes:
        columns: int64 [t], live slots of this rank, ascending.
        rows: int64 [R], the rows of the extended buffers that the columns read at some step, ascending.
        place: int64 [K, t]: at step k column i reads `rows[place[k, i]]`.
        starts: per step k, the integer a if `place[k]` is a, a + 1, ..., a + t - 1, so that the rows can be
            read as a slice; None if the columns read scattered rows.
    """

    columns: IntArray
    rows: IntArray
    place: IntArray
    starts: tuple[int | None, ...]


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads beside the draft's hidden states and weights. All are constants; the tensors are on
    the device.

    Attributes:
        tiles: the result of `loss_tiles`.
        teacher: the rows [R, Ht] of each tile in turn, the target's last hidden states, in the head's dtype.
        teacher_head: [Vd, Ht], the rows of the target's head that belong to the draft vocabulary.
        teacher_token: int64 [E], the target's argmax over its full vocabulary.
        draft_to_target: int64 [Vd], the target id of each draft id.
        contributing: bool [K, Q], supervised slots whose teacher token is in the draft vocabulary. Only these
            have a loss.
        supervised: bool [K, Q], see `LocalBatch`.
        step_weight: fp32 [K], decay**k / N_k (0 if no slot of the step is supervised).
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
    """Sums over this rank's slots: the loss, and statistics to report. Only `total` has a gradient.

    It is a tuple, because DeepSpeed puts hooks on the tensors of a module's output and does not find them in
    a dataclass.

    Attributes:
        total: scalar, sum_k step_weight[k] * step_loss[k].
        step_loss: fp32 [K], sum of the loss over contributing slots.
        hits: fp32 [K], supervised slots whose draft argmax is the teacher's token; counts: fp32 [K],
            supervised slots.
        joint_hits, joint_counts: fp32 [K], slots that are hits, or supervised, at all steps 0 .. k. The
            acceptance length of greedy decoding is 1 + sum_k joint_hits[k] / joint_counts[k].
        acceptance: fp32 [K], the chance that a server which samples accepts the guess, summed over supervised
            slots; 0 where the teacher's token is not in the draft vocabulary.
        joint_acceptance: fp32 [K], the product of these chances over the guesses 0 .. k, summed likewise. It
            gives the acceptance length of a server that samples.
    """

    total: Tensor
    step_loss: Tensor
    hits: Tensor
    counts: Tensor
    joint_hits: Tensor
    joint_counts: Tensor
    acceptance: Tensor
    joint_acceptance: Tensor


@marked(LOSS)
def tiled_loss(taps: LossTaps, norm_weight: Tensor, head_weight: Tensor, inputs: LossInputs) -> LossSum:
    """The loss of the K steps in `taps`, whose hidden states it drops.

    Args:
        taps: the steps' hidden states [Q, H].
        norm_weight: [H], the draft's final norm; head_weight: [Vd, H], the draft's head. Both are trained.
        inputs: constants.
    """
    total, *sums = _TiledLoss.apply(inputs, taps, norm_weight, head_weight, *taps.tickets)
    step_loss, hits, joint_hits, acceptance, joint_acceptance = sums
    # The tickets refer to the graph, whose nodes refer to the taps. Such a cycle runs through C++ nodes,
    # which Python's garbage collector cannot free.
    taps.hidden.clear()
    taps.tickets.clear()
    counts, joint_counts = inputs.supervised.sum(1).float(), inputs.supervised.cumprod(0).sum(1).float()
    return LossSum(total, step_loss, hits, counts, joint_hits, joint_counts, acceptance, joint_acceptance)


def loss_tiles(
    row: IntArray, supervised: NDArray[np.bool_], tile_bytes: int, vocabulary: int, itemsize: int
) -> list[LossTile]:
    """Cut the columns that some step supervises into tiles whose temporary memory fits a byte budget.

    A tile holds the teacher's probabilities of its R rows, and of its t columns the logits, the target and
    the gradients of all K steps. R is t + K - 1 for neighbouring columns, and up to t * K for scattered ones.
    Ranks may have different numbers of tiles, because no collective runs inside the loss.

    Args:
        row: int64 [Q], ascending, each slot's row in the extended buffers; step k reads row + 1 + k.
        supervised: bool [K, Q]. It includes slots whose teacher token is not in the draft vocabulary: they
            have no loss, but count for the accuracy.
        tile_bytes: the budget.
        vocabulary: Vd.
        itemsize: bytes of the trained weights' dtype.

    Raises:
        ValueError: the budget is too small for a tile of one slot.
    """
    steps = len(supervised)
    check_tile_bytes(tile_bytes, vocabulary, steps, itemsize)
    per_row, per_column = _row_and_column_bytes(vocabulary, steps, itemsize)
    columns = np.flatnonzero(supervised.any(0))
    ahead = 1 + np.arange(steps)[:, None]
    tiles: list[LossTile] = []
    start = 0
    while start < len(columns):
        # Begin with the size for neighbouring columns, and shrink it until scattered ones fit too.
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
    """Check that `tile_bytes` holds a tile of one slot, which reads `steps` teacher rows.

    Raises:
        ValueError: it does not.
    """
    per_row, per_column = _row_and_column_bytes(vocabulary, steps, itemsize)
    smallest = steps * per_row + per_column
    if tile_bytes < smallest:
        raise ValueError(
            f"loss.tile_bytes = {tile_bytes} is too small for a tile of one slot with a draft vocabulary of "
            f"{vocabulary} and {steps} TTT steps: at least {smallest} bytes are needed."
        )


def _row_and_column_bytes(vocabulary: int, steps: int, itemsize: int) -> tuple[int, int]:
    """Bytes of one row (teacher's logits and probabilities) and of one column (logits and target of one step,
    gradients of all) of a tile: fp32, and the logits once more in the dtype in which the matmul returns them,
    which is that of the gradients too.
    """
    return vocabulary * (4 + 4 + itemsize), vocabulary * (4 + 4 + itemsize + steps * itemsize)


class _TiledLoss(torch.autograd.Function):
    """Forward: the loss, and its gradients: d(h_k) is stored at the taps, d(norm) and d(head) are saved.
    Backward: multiplies d(norm) and d(head) by dtotal, and gives dtotal to the taps as their `scale`.
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
    @marked(LOSS)
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dnorm, dhead = ctx.saved_tensors
        ctx.taps.scale = dtotal
        norm_dtype, head_dtype = ctx.dtypes
        tickets = [dtotal.new_zeros(())] * ctx.steps
        return None, None, (dnorm * dtotal).to(norm_dtype), (dhead * dtotal).to(head_dtype), *tickets


class _Tally:
    """The sums over tiles, for the forward of `_TiledLoss`.

    Attributes:
        step_loss, hits, joint_hits, acceptance, joint_acceptance: [K], as in `LossSum`.
        weight: [K, Q], c_k * w_k.
        done: columns of the tiles that have been added.
        gradients: per step, the columns of all tiles int64 [C] and d(h_k) [C, H], filled tile by tile.
        dnorm: [H]; dhead: [Vd, H]; fp32 (fp64 for fp64) sums.
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
        """Add a tile; teacher [R, Ht] are its rows of the target's hidden states."""
        inputs, steps, device = self.inputs, len(self.hidden), self.head.device
        columns = torch.from_numpy(tile.columns).to(device, non_blocking=True)
        tokens = inputs.teacher_token[torch.from_numpy(tile.rows).to(device, non_blocking=True)]
        probability = (teacher @ inputs.teacher_head.T).to(self.dtype).softmax(-1)
        # The K steps one after another: [K * t, H].
        norm = NormTile(torch.cat([hidden[columns] for hidden in self.hidden]), self.norm, inputs.eps)
        size = (steps, len(columns), len(self.head))
        gradient = self.head.new_empty(size) if self.needs_grad else None
        contributing, supervised, weight = (
            x[:, columns] for x in (inputs.contributing, inputs.supervised, self.weight)
        )
        found = []
        for k, x in enumerate(norm.output.unflatten(0, size[:2])):
            # dz = w_k c_k d(loss) / dz is rounded to the head's dtype, so that both products run in it.
            dlogits = None if gradient is None else gradient[k]
            target = _read(probability, tile, k)
            found.append(weighted_terms(inputs.loss, x @ self.head.T, target, weight[k], dlogits))
        # [K, t] each: all guesses at once, because on a GPU every operator is a launch.
        value, acceptance, best = (torch.stack(of_steps) for of_steps in zip(*found, strict=True))
        token = torch.stack([_read(tokens, tile, k) for k in range(steps)])
        accepted = torch.where(contributing, acceptance, 0.0)
        right = (inputs.draft_to_target[best] == token) & supervised
        self.step_loss += torch.where(contributing, value, 0.0).sum(1)
        self.hits += right.sum(1)
        self.joint_hits += right.cumprod(0).sum(1)
        self.acceptance += accepted.sum(1)
        self.joint_acceptance += accepted.cumprod(0).sum(1)
        if gradient is not None:
            del probability, target
            dlogits = gradient.flatten(0, 1)
            accumulate_product(self.dhead, dlogits.T, norm.output)
            dhidden = norm.backward(dlogits @ self.head, self.dnorm).unflatten(0, size[:2])
            for (_, of_step), dhidden_k in zip(self.gradients, dhidden, strict=True):
                of_step[self.done : self.done + len(columns)] = dhidden_k
        self.done += len(columns)


def _read(rows: Tensor, tile: LossTile, step: int) -> Tensor:
    """The rows [t, ...] of `rows` [R, ...] that the tile's columns read at `step`; a view for neighbours."""
    start = tile.starts[step]
    if start is not None:
        return rows[start : start + len(tile.columns)]
    return rows[torch.from_numpy(tile.place[step]).to(rows.device)]
