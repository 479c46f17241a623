"""The byte counter that judges memory: every number here is worked out by hand."""

import gc

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from judge.tensor_bytes import TensorBytes

KIB = 256  # fp32 elements of one KiB


def test_views_and_in_place_operators_share_one_storage():
    with TensorBytes() as counted:
        x = torch.zeros(4 * KIB)
        view = x.view(4, KIB)[1:].t()
        view += 1
        assert (counted.live, counted.peak, counted.baseline) == (4096, 4096, 0)
        del x
        assert counted.live == 4096
        del view
        assert (counted.live, counted.peak) == (0, 4096)


def test_what_was_there_before_is_the_baseline_whenever_it_is_met():
    weight, late = torch.zeros(KIB), torch.zeros(2 * KIB)
    with TensorBytes() as counted:
        counted.add([weight, weight[1:]])
        assert (counted.live, counted.baseline) == (1024, 1024)
        sum_ = weight + 1
        del sum_
        assert (counted.peak, counted.above_baseline) == (2048, 1024)
        late.mul_(2)
        assert (counted.live, counted.baseline, counted.above_baseline) == (3072, 3072, 1024)


def test_what_no_operator_made_is_new_where_all_that_was_there_was_added():
    weight = torch.zeros(KIB)
    with TensorBytes(all_added=True) as counted:
        counted.add([weight])
        counted.mark()
        made_elsewhere = torch.from_numpy(np.zeros(2 * KIB, dtype=np.float32))
        made_elsewhere.add_(1)
        assert (counted.baseline, counted.above_baseline) == (1024, 2048)


def test_mark_starts_anew():
    with TensorBytes() as counted:
        kept = torch.zeros(KIB)
        torch.zeros(8 * KIB).sum()
        assert counted.peak >= 9 * 1024
        counted.mark()
        assert (counted.live, counted.baseline, counted.above_baseline) == (1024, 1024, 0)
        other = kept.clone()
        assert counted.above_baseline == 1024
        del other


class _Square(torch.autograd.Function):
    """Saves its input, makes one large tensor in backward that lives only there."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        wide = torch.zeros(64 * KIB)
        return gradient * x * (2 + wide[0])


def test_backward_of_a_custom_function_is_counted():
    x = torch.ones(KIB, requires_grad=True)
    with TensorBytes() as counted:
        loss = _Square.apply(_Square.apply(x)).sum()
        # Saved for backward: the first result only (x was there); the scalar loss, and the last square is
        # gone.
        assert counted.live - counted.baseline == 1024 + 4
        counted.mark()
        loss.backward()
        assert 64 * 1024 <= counted.above_baseline < 64 * 1024 + 8 * 1024
        del loss
        assert counted.live == 2 * 1024, "x and its gradient"
    assert x.grad is not None and torch.equal(x.grad, torch.full((KIB,), 4.0))


def test_recomputation_saves_what_it_says():
    def chain(x):
        for _ in range(6):
            x = x.exp()
        return x

    x = torch.zeros(KIB, requires_grad=True)
    live = {}
    for name in ("keep", "recompute"):
        with TensorBytes() as counted:
            out = chain(x * 1) if name == "keep" else checkpoint(chain, x * 1, use_reentrant=False)
            live[name] = counted.live - counted.baseline
        del out
    assert live == {"keep": 6 * 1024, "recompute": 2 * 1024}


def test_explains_the_peak_and_ignores_what_is_not_held():
    with TensorBytes(explain=True) as counted:
        a = torch.zeros(KIB)
        b = torch.zeros(3, KIB, dtype=torch.float16)
        torch.zeros(1 << 20, device="meta")
        del b
        assert counted.at_peak == {
            "aten.zeros.default float32 [256]": 1024,
            "aten.zeros.default float16 [3, 256]": 1536,
        }
    with TensorBytes(device_type="cuda") as nothing:
        torch.zeros(KIB)
    assert nothing.peak == 0
    del a


def test_a_storage_that_outlives_the_counter_is_released_without_it():
    with TensorBytes() as counted:
        x = torch.zeros(KIB)
    del x
    gc.collect()
    assert counted.live == 0
