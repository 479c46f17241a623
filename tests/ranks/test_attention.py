"""The USP attention over K steps against one dense softmax, outputs and raw gradients, in fp64."""

import numpy as np
import pytest
import torch
from torch import nn

from eagle3_ds.attention import LlamaUSPFlashAttention, UnrollKV
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.topology import maybe_setup_distributed

HEAD_DIM, STEPS = 8, 4
LENGTHS = (19, 3, 26, 7, 1)
# Answers at the ends of the first and the third document; the second is one as a whole.
ANSWERS = np.zeros(sum(LENGTHS), dtype=np.bool_)
ANSWERS[[*range(12, 22), *range(41, 48)]] = True
TOPOLOGIES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


class Projections(nn.Module):
    """A stand-in for a draft's attention: only its head size matters, the test hands in q, k and v."""

    def __init__(self):
        super().__init__()
        self.head_dim = HEAD_DIM
        self.q_proj = self.k_proj = self.v_proj = self.o_proj = nn.Identity()


def whole_inputs(padded_length, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(1)

    def random(heads):
        return torch.randn(STEPS, padded_length, heads, HEAD_DIM, generator=generator, dtype=torch.float64)

    return random(num_heads), random(num_kv_heads), random(num_kv_heads), random(num_heads)


def rank_of_attention(ring, ulysses, heads, kv_exchange, kept_blocks, kernel, live):
    topology = maybe_setup_distributed(ulysses, ring)
    plan = SpanPlan.make(LENGTHS, ring, ulysses, chunks_per_rank=3, live=live)
    place = topology.place
    slots = torch.from_numpy(plan.slots(place.ring_rank, place.ulysses_rank))
    q, k, v, dout = (x[:, slots] for x in whole_inputs(plan.padded_length, *heads))
    for x in (q, k, v):
        x.requires_grad_()
    attention = LlamaUSPFlashAttention(
        Projections(),
        select_kernel(kernel, topology.device, torch.float64, HEAD_DIM),
        topology.ulysses_group,
        topology.ring_group,
        kv_exchange,
        # A block of keys and values and its gradient, fp64.
        kept_blocks * 4 * plan.columns_per_ring_rank * heads[1] // ulysses * HEAD_DIM * 8,
    )
    assert (attention.sp_ring_degree, attention.sp_ulysses_degree) == (ring, ulysses)
    assert (attention.sp_world_size, attention.sp_rank) == (ring * ulysses, place.sp_rank)
    unroll = UnrollKV(plan, place.ring_rank)
    num_live = plan.live_per_rank
    # Key-only slots come along at step 0, with keys and values.
    counts = [len(slots)] + [num_live] * (STEPS - 1)
    outs = torch.stack(
        [attention.attend(q[s, :num_live], k[s, :n], v[s, :n], unroll) for s, n in enumerate(counts)]
    )
    (outs * dout.flatten(2)[:, :num_live]).sum().backward()
    whole = torch.zeros(STEPS, len(slots), outs.shape[-1], dtype=outs.dtype)
    whole[:, :num_live] = outs.detach()
    return slots, whole, q.grad, k.grad, v.grad


def dense(plan, num_heads, num_kv_heads):
    """Outputs and gradients of the plan's live slots, zeros elsewhere but for step 0's keys and values."""
    q, k, v, dout = whole_inputs(plan.padded_length, num_heads, num_kv_heads)
    for x in (q, k, v):
        x.requires_grad_()
    group = num_heads // num_kv_heads
    document = torch.from_numpy(plan.document)
    slot = torch.arange(plan.padded_length)
    causal = (slot[:, None] >= slot) & (document[:, None] == document) & (document >= 0)
    outs = []
    for step in range(STEPS):
        keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("ihd,jhd->hij", q[step], keys[0]) * HEAD_DIM**-0.5
        scores = scores.masked_fill(~causal, -torch.inf)
        diagonal = torch.einsum("ihd,sihd->his", q[step], keys[1 : step + 1]) * HEAD_DIM**-0.5
        weights = torch.cat((scores, diagonal), -1).softmax(-1).nan_to_num(0.0)
        out = torch.einsum("hij,jhd->ihd", weights[..., : len(slot)], values[0])
        out = out + torch.einsum("his,sihd->ihd", weights[..., len(slot) :], values[1 : step + 1])
        outs.append(out.flatten(1))
    looking = torch.zeros(plan.padded_length, dtype=torch.bool)
    looking[plan.live.reshape(-1)] = True
    looking &= document >= 0
    out = torch.stack(outs) * looking[:, None]
    (out * dout.flatten(2)).sum().backward()
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.ranks
@pytest.mark.parametrize("heads", [(8, 4), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize(
    ("kv_exchange", "kept_blocks"), [("gather", 0), ("ring", 0), ("ring", 1), ("ring", 3)]
)
@pytest.mark.parametrize(("ring", "ulysses"), TOPOLOGIES)
@pytest.mark.parametrize("live", [None, ANSWERS], ids=["all live", "answers live"])
def test_attention_equals_one_dense_softmax(run_ranks, live, ring, ulysses, kv_exchange, kept_blocks, heads):
    results = run_ranks(
        ring * ulysses, rank_of_attention, ring, ulysses, heads, kv_exchange, kept_blocks, "blockwise", live
    )
    plan = SpanPlan.make(LENGTHS, ring, ulysses, chunks_per_rank=3, live=live)
    assert (plan.rest.size > 0) == (live is not None)
    real = plan.document >= 0
    for name, part, expected in zip(("out", "dq", "dk", "dv"), range(1, 5), dense(plan, *heads), strict=True):
        whole = torch.full_like(expected, torch.nan)
        for result in results:
            whole[:, result[0]] = result[part]
        error = (whole - expected)[:, real].norm() / expected[:, real].norm()
        assert error <= 1e-12, f"{name}: relative error {error:.2e}"
