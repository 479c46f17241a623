"""Deliberate faults in the product, which the comparison must detect. The ranks of a case apply them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import model, step
from eagle3_ds.algorithms.peagle import model as peagle_model
from eagle3_ds.algorithms.peagle import step as peagle_step
from eagle3_ds.attention import usp
from eagle3_ds.attention.ring import RingKV
from eagle3_ds.attention.tiles import StepTiles
from eagle3_ds.draft import stream, taps
from eagle3_ds.draft.decoder import rms_norm
from eagle3_ds.layout import LocalBatch, LocalRows
from eagle3_ds.losses import lk_alpha, lk_lambda, tv
from eagle3_ds.train import trainer as trainer_module
from judge.block_faults import blocks_too_late, future_context, leaking_document
from judge.cases import NORMS, SHAPE, Case

MUTATIONS = (
    "scale_by_sp",
    "dropped_halo",
    "leaking_document",
    "rope_off_by_one",
    "lost_tap",
    "lost_diagonals",
    "lost_prompts",
    "lost_blocks",
    "fixed_window",
    "unnormalised_overlap",
    "swapped_layers",
    "lost_output_norm",
    "whole_rotary",
    "targets_theta",
    "scale_of_width",
    "lost_width",
    "narrow_teacher",
    "unseen_chain",
    "masks_at_the_slot",
    "lost_mask_hidden",
    "targets_mask_row",
    "future_context",
    "blocks_too_late",
)
OF_TRAINER = ("scale_by_sp", "scale_of_width", "narrow_teacher")
"""Applied to the trainer, once it is made."""
SHAPES = {"scale_of_width": "head_dim", "lost_width": "mlp", "narrow_teacher": "narrow"}
"""The shape of a draft that shows a mutation."""
OF_PEAGLE = ("unseen_chain", "masks_at_the_slot", "lost_mask_hidden", "targets_mask_row")
"""What only a draft with masks shows."""
OF_DFLASH = {"future_context": future_context, "blocks_too_late": blocks_too_late}
"""What only a draft of blocks shows."""


@contextmanager
def mutate(name: str | None, case: Case) -> Iterator[None]:
    """Patch the product during the block, in which a case runs. `mutate_trainer` applies OF_TRAINER.

    Raises:
        ValueError: the mutation is unknown, or changes nothing in this case.
    """
    if case.shape != SHAPES.get(str(name), case.shape):
        raise ValueError(f"{name} needs another shape. Use a case with shape {SHAPES[str(name)]}.")
    if name in OF_PEAGLE and case.algorithm != "peagle":
        raise ValueError(f"{name} needs masks. Use a case with algorithm peagle.")
    if name in OF_DFLASH and (case.algorithm != "dflash" or case.kv_exchange != "gather"):
        raise ValueError(f"{name} needs blocks. Use a case with algorithm dflash and kv_exchange gather.")
    if name is None or name in OF_TRAINER:
        yield
    elif name in OF_DFLASH:
        with OF_DFLASH[name]():
            yield
    elif name in OF_PEAGLE:
        if case.ttt_steps == 1:
            raise ValueError(f"{name} needs masks. Use a case with several guesses.")
        with _masks_mutated(name):
            yield
    elif name in ("whole_rotary", "targets_theta"):
        if case.rope != "partial":
            raise ValueError(f"{name} needs a rotary embedding of its own. Use a case with rope partial.")
        with mock.patch.object(model, "rotary_frequencies", _with_rope(model.rotary_frequencies, name)):
            yield
    elif name == "lost_width":
        lost = _of_target_width(step.after_attention_backward)
        with mock.patch.object(step, "after_attention_backward", lost):
            yield
    elif name == "dropped_halo":
        with mock.patch.object(
            trainer_module, "prepare_usp_input", _without_halo(trainer_module.prepare_usp_input)
        ):
            yield
    elif name == "leaking_document":
        if case.kv_exchange != "gather":
            raise ValueError(
                "leaking_document patches the gathered tiles. Use a case with kv_exchange gather."
            )
        with leaking_document():
            yield
    elif name == "rope_off_by_one":
        # Wrong from the second TTT step on only: RoPE is relative, so shifting all steps changes nothing.
        with mock.patch.object(model, "rotary_positions", lambda position, step: position + max(step - 1, 0)):
            yield
    elif name == "lost_tap":
        with mock.patch.object(taps._Tap, "backward", staticmethod(_without_step_1(taps._Tap.backward))):
            yield
    elif name == "lost_diagonals":
        with mock.patch.object(usp, "merge_diagonals_backward", _into_nowhere(usp.merge_diagonals_backward)):
            yield
    elif name == "lost_prompts":
        if case.documents != "answers" or case.layers > 1:
            raise ValueError(
                "lost_prompts needs slots that are not live. Use a case with documents answers and one layer."
            )
        with mock.patch.object(step, "_backward_before", _of_live_slots(step._backward_before)):
            yield
    elif name == "lost_blocks":
        if case.kv_exchange != "ring_kept":
            raise ValueError("lost_blocks needs blocks that are kept. Use a case with kv_exchange ring_kept.")
        with mock.patch.object(RingKV, "take_gradients", _of_own_block(RingKV.take_gradients)):
            yield
    elif name == "fixed_window":
        if case.window is None:
            raise ValueError("fixed_window needs a window. Use a case with one.")
        with mock.patch.object(StepTiles, "at", _of_step_0(StepTiles.at)):
            yield
    elif name == "unnormalised_overlap":
        if case.loss == "kl":
            raise ValueError("unnormalised_overlap needs a loss that aims at acceptance. Use such a case.")
        with ExitStack() as patches:
            for module in (tv, lk_alpha, lk_lambda):
                patches.enter_context(mock.patch.object(module, "overlap", _unnormalised(module.overlap)))
            yield
    elif name == "swapped_layers":
        if case.aux_layers == 1:
            raise ValueError("swapped_layers needs more than one captured layer. Use a case with several.")
        with mock.patch.object(stream, "stream_rows", _rolled(stream.stream_rows, case.aux_layers)):
            yield
    elif name == "lost_output_norm":
        if "norm_output" not in NORMS[case.norms]:
            raise ValueError(
                "lost_output_norm needs outputs that are normed. Use a case with norms eagle3.1."
            )
        with mock.patch.object(
            model, "normed_in_tiles", lambda x, weight, eps: rms_norm(x, weight.detach(), eps)
        ):
            yield
    else:
        raise ValueError(f"mutation = {name!r} is unknown. Use one of {', '.join(MUTATIONS)}.")


@contextmanager
def _masks_mutated(name: str) -> Iterator[None]:
    """`unseen_chain`: a mask sees its own key, but none of the masks before it. `masks_at_the_slot`: masks
    stand one position too early. `lost_mask_hidden`: the projection gives the masks' hidden state no
    gradient. `targets_mask_row`: where a text holds the mask token, the target's row is read.
    """
    if name == "unseen_chain":
        patch = mock.patch.object(usp, "merge_diagonals", _of_own_key(usp.merge_diagonals))
    elif name == "masks_at_the_slot":
        patch = mock.patch.object(
            peagle_model, "rotary_positions", lambda position, guess: position + max(guess - 1, 0)
        )
    elif name == "lost_mask_hidden":
        patch = mock.patch.object(stream, "_prepared_backward", _without_rows(stream._prepared_backward))
    else:
        patch = mock.patch.object(peagle_step.FirstStep, "embeds", step.Step.embeds)
    with patch:
        yield


def _of_own_key(merge: Any) -> Any:
    """Of the diagonal keys only the last one is merged."""

    def of_own_key(out: Tensor, lse: Tensor, q: Tensor, keys: Any, values: Any, scale: float) -> Any:
        return merge(out, lse, q, keys[-1:], values[-1:], scale)

    return of_own_key


def _without_rows(backward: Any) -> Any:
    """The gradient of trained rows is zero."""

    def without_rows(*arguments: Any) -> Any:
        rows = backward(*arguments)
        return None if rows is None else torch.zeros_like(rows)

    return without_rows


def mutate_trainer(name: str | None, trainer: trainer_module.DraftTrainer) -> None:
    """Apply a mutation of OF_TRAINER.

    `scale_by_sp`: the factor of the loss shares leaves out the sequence-parallel ranks. `scale_of_width`:
    scores are scaled as if the heads together were as wide as the hidden state. `narrow_teacher`: only as
    much of the teacher's hidden state is read as the draft's has.
    """
    config = trainer.draft.config
    if name == "scale_by_sp":
        trainer.loss_scale /= trainer.topology.sp_world_size
        # The product refuses a wrong scale by itself; here the comparison with the reference must see it.
        trainer.scale_check.stop()
    elif name == "scale_of_width":
        for module in trainer.draft.modules():
            if isinstance(module, usp.LlamaUSPFlashAttention):
                module.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    elif name == "narrow_teacher":
        trainer._teacher_head[:, config.hidden_size :] = 0


def _with_rope(frequencies: Any, name: str) -> Any:
    """`whole_rotary`: a rotary embedding of part of the head turns all of it. `targets_theta`: the target's
    theta.
    """

    def with_rope(config: LlamaConfig, device: torch.device) -> Any:
        changed = copy.copy(config)
        changes = {"partial_rotary_factor": 1.0} if name == "whole_rotary" else {"rope_theta": 10000.0}
        changed.rope_parameters = {**config.rope_parameters, **changes}
        return frequencies(changed, device)

    return with_rope


def _of_target_width(backward: Any) -> Any:
    """Columns of the MLP beyond the target's width get no gradient."""

    def of_target_width(*arguments: Any) -> Any:
        sums, width = arguments[4], SHAPE["target"][1]
        before = [total.clone() for total in (sums.gate, sums.up)]
        result = backward(*arguments)
        for total, old in zip((sums.gate, sums.up), before, strict=True):
            total[width:] = old[width:]
        return result

    return of_target_width


def _without_halo(cut: Any) -> Any:
    """Rows that belong to other ranks read as zeros."""

    def cut_without_halo(*args: Any) -> LocalBatch:
        batch = cut(*args)
        own = torch.zeros(len(batch.token_ids), dtype=torch.bool)
        own[batch.row] = True
        teacher = batch.teacher[:] * own[:, None]
        rows = LocalRows(teacher, np.arange(len(own)), len(own))
        return replace(batch, token_ids=batch.token_ids * own, teacher=rows)

    return cut_without_halo


def _without_step_1(backward: Any) -> Any:
    """The loss of step 1 adds nothing to the hidden state's gradient."""

    def without_step_1(ctx: Any, dhidden: Tensor, dticket: Tensor) -> Any:
        return (dhidden, None, None) if ctx.step == 1 else backward(ctx, dhidden, dticket)

    return without_step_1


def _into_nowhere(backward: Any) -> Any:
    """The gradients of a TTT step for the diagonals of earlier steps are dropped."""

    def into_nowhere(*args: Any) -> Any:
        *constants, dkeys, dvalues = args
        return backward(*constants, *([x.clone() for x in gradients] for gradients in (dkeys, dvalues)))

    return into_nowhere


def _of_live_slots(backward: Any) -> Any:
    """The keys and values of slots that are not live get no gradient."""

    def of_live_slots(ttt_step: Any, tiles: Any, *args: Any) -> None:
        backward(ttt_step, tiles._replace(rest=[]), *args)

    return of_live_slots


def _of_own_block(take: Any) -> Any:
    """A rank does not return the gradients of the other ranks' blocks that it kept."""

    def of_own_block(ring: RingKV) -> Any:
        ring.gradients = ring.gradients[:1]
        return take(ring)

    return of_own_block


def _of_step_0(at: Any) -> Any:
    """The window does not move: every TTT step attends to the same step-0 keys as step 0."""
    return lambda tiles, _step: at(tiles, 0)


def _rolled(rows_of: Any, num_layers: int) -> Any:
    """The captured layers are concatenated in another order."""
    return lambda *args: (rows.roll(rows.shape[1] // num_layers, dims=1) for rows in rows_of(*args))


def _unnormalised(overlap: Any) -> Any:
    """The gradient of the overlap leaves out that the draft's probabilities sum to one."""

    def unnormalised_overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, _, q = overlap(logits, target)
        return alpha, torch.heaviside(target - q, q.new_tensor(0.5)) * q, q

    return unnormalised_overlap
