"""The tiled loss against plain autograd over full logits, through the taps of an unroll."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from eagle3_ds.config import LossSection
from eagle3_ds.draft import LossInputs, LossTaps, loss_tiles, tiled_loss
from eagle3_ds.losses import LOSSES, loss_of

K, S, H, HT, VD, V = 3, 23, 8, 6, 17, 40
ROWS = S + K + 4
EPS = 1e-5
# One fp64 slot reads K rows and has K gradients.
SMALLEST = K * VD * (4 + 4 + 8) + VD * (4 + 4 + 8 + K * 8)


def make(seed=0, supervised_share=0.6, tile_bytes=2**14, kind="kl"):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Two spans with a halo between them: rows of the extended buffer are not simply column + constant.
    row = torch.cat((torch.arange(10), torch.arange(10, S) + 4))
    draft_to_target = torch.randperm(V, generator=generator)[:VD].sort().values
    teacher_token = torch.randint(0, V, (ROWS,), generator=generator)
    supervised = torch.rand(K, S, generator=generator) < supervised_share
    in_vocabulary = torch.isin(teacher_token, draft_to_target)
    tiles = loss_tiles(row.numpy(), supervised.numpy(), tile_bytes, VD, 8)
    teacher = random(ROWS, HT)
    inputs = LossInputs(
        tiles=tiles,
        teacher=[teacher[torch.from_numpy(tile.rows)] for tile in tiles],
        teacher_head=random(VD, HT),
        teacher_token=teacher_token,
        draft_to_target=draft_to_target,
        contributing=supervised & in_vocabulary[row[None] + 1 + torch.arange(K)[:, None]],
        supervised=supervised,
        step_weight=torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64),
        eps=EPS,
        loss=loss_of(LossSection(kind=kind)),
    )
    leaves = [
        random(H).requires_grad_(),
        random(VD, H).requires_grad_(),
        *(random(S, H).requires_grad_() for _ in range(K)),
    ]
    return inputs, row, teacher, leaves


def chain(leaves, on_step):
    """Hidden states that depend on each other as the steps of an unroll do."""
    hidden, outputs = 0.0, []
    for leaf in leaves:
        hidden = on_step(torch.tanh(leaf + 0.5 * hidden))
        outputs.append(hidden)
    return outputs


def tapped(inputs, leaves):
    norm, head, *steps = leaves
    taps = LossTaps()
    chain(steps, taps.add)
    return tiled_loss(taps, norm, head, inputs)


def dense(inputs, row, teacher, leaves):
    norm, head, *steps = leaves
    total, losses, hits, joint, acceptance, joint_acceptance = 0.0, [], [], [], [], []
    all_right, all_accepted = torch.ones(S, dtype=torch.bool), torch.ones(S, dtype=torch.float64)
    for k, hidden in enumerate(chain(steps, lambda x: x)):
        rows = row + 1 + k
        target = (teacher[rows] @ inputs.teacher_head.T).softmax(-1)
        logits = hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt() * norm @ head.T
        loss = (inputs.loss.plain(logits, target) * inputs.contributing[k]).sum()
        accepted = torch.minimum(logits.softmax(-1), target).sum(-1) * inputs.contributing[k]
        all_accepted = all_accepted * accepted
        right = (inputs.draft_to_target[logits.argmax(-1)] == inputs.teacher_token[rows]) & inputs.supervised[
            k
        ]
        all_right = all_right & right
        total = total + loss * inputs.step_weight[k]
        losses.append(loss.item())
        hits.append(right.sum().item())
        joint.append(all_right.sum().item())
        acceptance.append(accepted.sum().item())
        joint_acceptance.append(all_accepted.sum().item())
    return total, losses, hits, joint, acceptance, joint_acceptance


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("tile_bytes", [SMALLEST, 2**14, 2**22])
def test_values_and_raw_gradients_equal_full_logits(tile_bytes, kind):
    inputs, row, teacher, leaves = make(tile_bytes=tile_bytes, kind=kind)
    result = tapped(inputs, leaves)
    grads = torch.autograd.grad(result.total * 3.0, leaves)
    total, losses, hits, joint, acceptance, joint_acceptance = dense(inputs, row, teacher, leaves)
    expected = torch.autograd.grad(total * 3.0, leaves)
    assert torch.allclose(result.total, total, rtol=1e-13)
    assert torch.allclose(result.step_loss, torch.tensor(losses, dtype=torch.float64), rtol=1e-13)
    assert result.hits.tolist() == hits
    assert result.joint_hits.tolist() == joint
    assert torch.allclose(result.acceptance, torch.tensor(acceptance, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(
        result.joint_acceptance, torch.tensor(joint_acceptance, dtype=torch.float64), rtol=1e-12
    )
    assert result.counts.tolist() == inputs.supervised.sum(1).tolist()
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).norm() <= 1e-13 * reference.norm()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_bf16_gradients_are_those_of_the_rounded_logits(kind, seed):
    """The gradient of min(p, q) jumps where p = q, and rounding chooses the side: the fp64 gradient is taken
    at the logits and at the teacher that bf16 gives.
    """
    inputs, row, teacher, leaves = make(seed=seed, kind=kind, tile_bytes=2**22)
    low = {
        "teacher": [rows.bfloat16() for rows in inputs.teacher],
        "teacher_head": inputs.teacher_head.bfloat16(),
        "step_weight": inputs.step_weight.float(),
    }
    norm, head, *steps = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    taps = LossTaps()
    for step in steps:
        taps.add(step)
    result = tiled_loss(taps, norm, head, dataclasses.replace(inputs, **low))
    found = torch.autograd.grad(result.total, [norm, head, *steps])

    exact = [leaf.detach().double().requires_grad_() for leaf in (norm, head, *steps)]
    total = torch.zeros((), dtype=torch.float64)
    for k, hidden in enumerate(exact[2:]):
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt() * exact[0]
        logits = normed @ exact[1].T
        rounded = functional.rms_norm(steps[k], (H,), norm, EPS) @ head.T
        logits = logits + (rounded.double() - logits).detach()
        rows = row + 1 + k
        target = (teacher[rows].bfloat16() @ low["teacher_head"].T).double().softmax(-1)
        total = (
            total + (inputs.loss.plain(logits, target) * inputs.contributing[k]).sum() * inputs.step_weight[k]
        )
    assert total.item() == pytest.approx(result.total.item(), rel=1e-4)
    for grad, reference in zip(found, torch.autograd.grad(total, exact), strict=True):
        assert (grad.double() - reference).norm() <= 2e-2 * reference.norm()


def test_a_rank_without_supervision_gives_zero_gradients_not_none():
    inputs, _, _, leaves = make(supervised_share=0.0)
    result = tapped(inputs, leaves)
    assert result.total.item() == 0.0
    for grad in torch.autograd.grad(result.total, leaves):
        assert not grad.any()


def test_no_tensor_of_slots_by_vocabulary_survives_the_forward():
    inputs, _, _, leaves = make()
    taps = LossTaps()
    chain(leaves[2:], taps.add)
    saved = []

    def note(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    norm_weight, head_weight = leaves[:2]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        tiled_loss(taps, norm_weight, head_weight, inputs)
    assert (VD, H) in saved
    # What a tile saves while it lasts is [t, H] at most.
    assert all(shape == (VD, H) or shape[-1:] != (VD,) for shape in saved)
    columns = int(inputs.supervised.any(0).sum())
    assert [gradient.shape for _, gradient in taps.gradients] == [(columns, H)] * K


def test_a_budget_too_small_for_one_slot_names_the_bytes_needed():
    with pytest.raises(ValueError, match=rf"loss.tile_bytes = {SMALLEST - 1} .* at least {SMALLEST} bytes"):
        make(tile_bytes=SMALLEST - 1)


@given(st.data())
def test_tiles_hold_every_supervised_column_once_and_keep_to_the_budget(data):
    steps, slots = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 60))
    gaps = np.array(data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 9]), min_size=slots, max_size=slots)))
    row = np.cumsum(gaps) - gaps[0]
    generator = np.random.default_rng(data.draw(st.integers(0, 9)))
    supervised = generator.random((steps, slots)) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    per_row, per_column = 10 * 12, 10 * (12 + 4 * steps)
    budget = data.draw(st.integers(steps * per_row + per_column, 80 * per_row))
    tiles = loss_tiles(row, supervised, budget, vocabulary=10, itemsize=4)
    columns = np.concatenate([tile.columns for tile in tiles]) if tiles else np.empty(0)
    assert columns.tolist() == np.flatnonzero(supervised.any(0)).tolist()
    for tile in tiles:
        assert len(tile.rows) * per_row + len(tile.columns) * per_column <= budget
        for k in range(steps):
            assert (tile.rows[tile.place[k]] == row[tile.columns] + 1 + k).all()
            start = tile.starts[k]
            if start is not None:
                assert (tile.place[k] == start + np.arange(len(tile.columns))).all()
