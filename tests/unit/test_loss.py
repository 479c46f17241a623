"""The tiled loss against plain autograd over full logits."""

import pytest
import torch

from eagle3_ds.loss import LossInputs, tiled_soft_cross_entropy

K, S, H, HT, VD, V = 3, 23, 8, 6, 17, 40
ROWS = S + K + 4


def make(seed=0, supervised_share=0.6, tile_bytes=2**14):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Two spans with a halo between them: rows of the extended buffer are not simply column + constant.
    row = torch.cat((torch.arange(10), torch.arange(10, S) + 4))
    draft_to_target = torch.randperm(V, generator=generator)[:VD].sort().values
    teacher_token = torch.randint(0, V, (ROWS,), generator=generator)
    inputs = LossInputs(
        row=row,
        teacher=random(ROWS, HT),
        teacher_head=random(VD, HT),
        teacher_token=teacher_token,
        draft_to_target=draft_to_target,
        in_vocabulary=torch.isin(teacher_token, draft_to_target),
        supervised=torch.rand(K, S, generator=generator) < supervised_share,
        step_weight=torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64),
        tile_bytes=tile_bytes,
    )
    students = [random(S, H).requires_grad_() for _ in range(K)]
    return inputs, students, random(VD, H).requires_grad_()


def dense(inputs, students, head):
    total, losses, hits, joint = 0.0, [], [], []
    all_right = torch.ones(S, dtype=torch.bool)
    for k, student in enumerate(students):
        rows = inputs.row + 1 + k
        teacher = (inputs.teacher[rows] @ inputs.teacher_head.T).softmax(-1)
        logits = student @ head.T
        entropy = -(teacher * logits.log_softmax(-1)).sum(-1)
        loss = (entropy * inputs.supervised[k] * inputs.in_vocabulary[rows]).sum()
        right = (inputs.draft_to_target[logits.argmax(-1)] == inputs.teacher_token[rows]) & inputs.supervised[k]
        all_right = all_right & right
        total = total + loss * inputs.step_weight[k]
        losses.append(loss.item())
        hits.append(right.sum().item())
        joint.append(all_right.sum().item())
    return total, losses, hits, joint


@pytest.mark.parametrize("tile_bytes", [VD * 8 * 14, 2**14, 2**22])
def test_values_and_raw_gradients_equal_full_logits(tile_bytes):
    inputs, students, head = make(tile_bytes=tile_bytes)
    result = tiled_soft_cross_entropy(students, head, inputs)
    grads = torch.autograd.grad(result.total * 3.0, [head, *students])
    total, losses, hits, joint = dense(inputs, students, head)
    expected = torch.autograd.grad(total * 3.0, [head, *students])
    assert torch.allclose(result.total, total, rtol=1e-13)
    assert torch.allclose(result.step_loss, torch.tensor(losses, dtype=torch.float64), rtol=1e-13)
    assert result.hits.tolist() == hits
    assert result.joint_hits.tolist() == joint
    assert result.counts.tolist() == inputs.supervised.sum(1).tolist()
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).norm() <= 1e-13 * reference.norm()


def test_a_rank_without_supervision_gives_zero_gradients_not_none():
    inputs, students, head = make(supervised_share=0.0)
    result = tiled_soft_cross_entropy(students, head, inputs)
    assert result.total.item() == 0.0
    for grad in torch.autograd.grad(result.total, [head, *students]):
        assert not grad.any()


def test_no_tensor_of_slots_by_vocabulary_survives_the_forward():
    inputs, students, head = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        tiled_soft_cross_entropy(students, head, inputs)
    assert sorted(saved) == sorted([(VD, H)] + [(S, H)] * K)


def test_a_budget_too_small_for_one_slot_names_the_bytes_needed():
    inputs, students, head = make(tile_bytes=VD * 8)
    with pytest.raises(ValueError, match=rf"loss.tile_bytes = {VD * 8} .* at least {(6 + 2 * K) * VD * 8} bytes"):
        tiled_soft_cross_entropy(students, head, inputs)
