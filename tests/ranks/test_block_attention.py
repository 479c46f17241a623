"""The attention of blocks over ring x ulysses against one dense softmax: outputs and gradients, in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eagle3_ds.attention import LlamaUSPFlashAttention
from eagle3_ds.attention.blocks import attend_blocks
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.topology import maybe_setup_distributed
from tests.ranks.test_attention import HEAD_DIM, TOPOLOGIES, Projections

INPUTS, WINDOW = 3, 8
LENGTHS = (19, 3, 26, 7, 1)
HEADS = (8, 4)
# At the first and the last slot of a document, a stretch, scattered ones, none in the fourth document.
MANY = (0, 5, 6, 7, 8, 14, 18, 19, 24, 47, 55)
ONE = (30,)


def whole_inputs(length: int) -> dict[str, Tensor]:
    """Of every slot: queries, keys and values of its block, those of the context, the output's gradient."""
    generator = torch.Generator().manual_seed(1)
    heads = {"q": HEADS[0], "k": HEADS[1], "v": HEADS[1], "dout": HEADS[0]}
    whole = {
        name: torch.randn(length, INPUTS, n, HEAD_DIM, generator=generator, dtype=torch.float64)
        for name, n in heads.items()
    }
    for name in ("k_context", "v_context"):
        whole[name] = torch.randn(length, HEADS[1], HEAD_DIM, generator=generator, dtype=torch.float64)
    return whole


def cut(ring: int, ulysses: int, anchors: tuple[int, ...], window: int | None) -> SpanPlan:
    live = np.zeros(sum(LENGTHS), dtype=np.bool_)
    live[list(anchors)] = True
    return SpanPlan.make(LENGTHS, ring, ulysses, chunks_per_rank=3, live=live, window=window)


def rank_of_blocks(
    ring: int, ulysses: int, anchors: tuple[int, ...], exchange: str, causal: bool, window: int | None
) -> dict[str, Tensor]:
    topology = maybe_setup_distributed(ulysses, ring)
    plan = cut(ring, ulysses, anchors, window)
    place = topology.place
    slots = torch.from_numpy(plan.slots(place.ring_rank, place.ulysses_rank))
    asking = slots[: plan.live_per_rank]
    whole = whole_inputs(plan.padded_length)
    own = {name: whole[name][asking].requires_grad_() for name in "qkv"}
    context = {name: whole[f"{name}_context"][slots].requires_grad_() for name in "kv"}
    attention = LlamaUSPFlashAttention(
        Projections(),
        select_kernel("blockwise", topology.device, torch.float64, HEAD_DIM),
        topology.ulysses_group,
        topology.ring_group,
        exchange,  # type: ignore[arg-type]
        window=window,
    )
    out = attend_blocks(
        attention,
        own["q"],
        (context["k"], context["v"]),
        (own["k"], own["v"]),
        plan,
        place.ring_rank,
        causal,
    )
    (out * whole["dout"][asking].flatten(2)).sum().backward()
    found: dict[str, Any] = {f"d{name}": x.grad for name, x in own.items()}
    found |= {f"d{name}_context": x.grad for name, x in context.items()}
    return {**found, "out": out.detach(), "asking": asking, "slots": slots}


def dense(plan: SpanPlan, causal: bool, window: int | None) -> dict[str, Tensor]:
    """The same of all slots that are live in the plan; nothing of others but their context's gradients."""
    whole = whole_inputs(plan.padded_length)
    dout = whole.pop("dout")
    for x in whole.values():
        x.requires_grad_()
    document, slot = torch.from_numpy(plan.document), torch.arange(plan.padded_length)
    group = HEADS[0] // HEADS[1]
    scale = HEAD_DIM**-0.5
    keys, values, own_k, own_v = (
        whole[name].repeat_interleave(group, -2) for name in ("k_context", "v_context", "k", "v")
    )
    seen = (slot[:, None] >= slot) & (document[:, None] == document) & (document >= 0)
    inputs = torch.arange(INPUTS)
    sees = seen[:, None].expand(-1, INPUTS, -1)
    if window is not None:
        sees = sees & ((slot[:, None] + 1 + inputs)[..., None] - slot < window)
    context = torch.einsum("sihd,jhd->sihj", whole["q"], keys) * scale
    context = context.masked_fill(~sees[:, :, None], -torch.inf)
    own = torch.einsum("sihd,schd->sihc", whole["q"], own_k) * scale
    if causal:
        own = own.masked_fill((inputs[:, None] < inputs)[:, None], -torch.inf)
    weights = torch.cat((context, own), -1).softmax(-1)
    out = torch.einsum("sihj,jhd->sihd", weights[..., : len(slot)], values)
    out = out + torch.einsum("sihc,schd->sihd", weights[..., len(slot) :], own_v)
    looking = torch.zeros(plan.padded_length, dtype=torch.bool)
    looking[plan.live.reshape(-1)] = True
    looking &= document >= 0
    (out * dout * looking[:, None, None, None]).sum().backward()
    gradients = {f"d{name}": x.grad for name, x in whole.items() if x.grad is not None}
    return {"out": out.detach().flatten(2), **gradients}


@pytest.mark.ranks
@pytest.mark.parametrize("window", [None, WINDOW], ids=["all keys", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("anchors", [MANY, ONE], ids=["many", "one"])
@pytest.mark.parametrize(("ring", "ulysses"), TOPOLOGIES)
def test_blocks_equal_one_dense_softmax(
    run_ranks: Any,
    ring: int,
    ulysses: int,
    anchors: tuple[int, ...],
    exchange: str,
    causal: bool,
    window: int | None,
) -> None:
    ranks = ring * ulysses
    results = run_ranks(ranks, rank_of_blocks, ring, ulysses, anchors, exchange, causal, window)
    plan = cut(ring, ulysses, anchors, window)
    real = torch.from_numpy(plan.document >= 0)
    expected = dense(plan, causal, window)
    for name in expected:
        places = "slots" if name.endswith("context") else "asking"
        for result in results:
            inside = real[result[places]]
            wanted = expected[name][result[places]][inside]
            error = (result[name][inside] - wanted).norm() / wanted.norm()
            assert not inside.any() or error <= 1e-12, f"{name}: relative error {error:.2e}"
    without = [not set(result["asking"].tolist()) & set(anchors) for result in results]
    assert sum(without) == (ranks - 1 if anchors == ONE else 0), "ranks that have no anchor of their own"
