"""The training pass of DFlash on ranks against the dense reference, in fp64: loss and the gradient of every
weight, without DeepSpeed between them. Three faults of the product are rejected.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.dflash.anchors import SampledAnchors
from eagle3_ds.algorithms.dflash.model import DFlashModel
from eagle3_ds.algorithms.dflash.step import BlockSettings
from eagle3_ds.algorithms.dflash.supervision import BlockSupervision
from eagle3_ds.attention import patch_attention
from eagle3_ds.draft import LossInputs, LossTaps, loss_tiles, tiled_loss
from eagle3_ds.draft.geometry import aux_keys, window_keys
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import LocalBatch, PackedSequence, SpanPlan, live_slots, prepare_usp_input, stream_rows
from eagle3_ds.losses.kl import KL
from eagle3_ds.topology import Topology, maybe_setup_distributed
from judge.block_faults import blocks_too_late, future_context, leaking_document
from judge.collective_calls import CollectiveCalls
from judge.dense_reference import Frozen, LossRules, MicroBatch, StepResult
from judge.dflash_reference import dflash_step

LENGTHS, SIZE, VOCABULARY, DRAFT_VOCABULARY, HIDDEN, TARGET = (21, 2, 30, 1, 13), 4, 23, 15, 8, 6
HEADS, KEY_HEADS, HEAD_DIM, WIDTH, AUX = 8, 4, 4, 12, 2
MASK_TOKEN = 3
# All is in fp64 but the angles of the rotary embedding, which the product takes in fp32.
TOLERANCE = 1e-6
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]


@dataclass(frozen=True)
class Run:
    """What a case is made of; `share` None: one anchor alone, so that most ranks have none of their own."""

    layers: int = 1
    activation: Any = "keep"
    causal: bool = False
    window: int | None = None
    own_mask: bool = False
    share: float | None = 0.6
    exchange: Any = "gather"
    alignment: Any = "served"
    reduction: str = "supervised"
    fault: str | None = None

    @property
    def rules(self) -> LossRules:
        return LossRules(SIZE - 1, 0.8, self.alignment, self.reduction)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM,
            intermediate_size=WIDTH, num_hidden_layers=self.layers, vocab_size=VOCABULARY,
            draft_vocab_size=DRAFT_VOCABULARY, rms_norm_eps=1e-6, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0}, block_size=SIZE,
            mask_token_id=MASK_TOKEN, mask_embedding=self.own_mask, block_causal=self.causal,
            **aux_keys(AUX, TARGET), **window_keys(self.window, self.layers),
        )  # fmt: skip


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights_of(config: LlamaConfig) -> dict[str, Tensor]:
    """Random weights by the page's names; norms around one, each another."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, AUX * TARGET),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCABULARY, HIDDEN),
    }
    q, kv = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    for layer in range(config.num_hidden_layers):
        of: dict[str, tuple[int, ...]] = {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "self_attn.q_norm": (HEAD_DIM,),
            "self_attn.k_norm": (HEAD_DIM,),
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in of.items()}
    weights = {
        name: 1 + 0.3 * drawn(generator, *shape)
        if len(shape) == 1
        else drawn(generator, *shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    if config.mask_embedding:
        weights["mask_embedding"] = drawn(generator, HIDDEN)
    return weights


def inputs_of(run: Run) -> tuple[MicroBatch, Frozen]:
    """A pack whose texts hold the mask token too, and what is frozen."""
    generator = torch.Generator().manual_seed(1)
    length = sum(LENGTHS)
    tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
    # A stretch of the third document is the user's.
    mask = torch.ones(length, dtype=torch.bool)
    mask[30:36] = False
    anchors = torch.zeros(length, dtype=torch.bool)
    if run.share is None:
        anchors[44] = True
    else:
        rule = BlockSupervision(SIZE - 1, run.alignment)
        anchors = SampledAnchors(rule, run.share, 5)(0, range(len(LENGTHS)), LENGTHS, mask)
        # At a document's start and at its last slot that has a token behind it.
        anchors[[0, 19, 23, 51]] = True
        anchors &= torch.from_numpy(live_slots(LENGTHS, mask, rule))
    chosen = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    frozen = Frozen(
        drawn(generator, VOCABULARY, HIDDEN),
        drawn(generator, VOCABULARY, TARGET),
        chosen - torch.arange(DRAFT_VOCABULARY),
    )
    states = (drawn(generator, length, AUX * TARGET), drawn(generator, length, TARGET))
    return MicroBatch(tokens, mask, LENGTHS, *states, anchors), frozen


def pack_of(batch: MicroBatch, frozen: Frozen) -> PackedSequence:
    best = (batch.teacher @ frozen.head.T).argmax(-1)
    return PackedSequence(
        batch.token_ids, batch.loss_mask, batch.lengths, best, batch.aux, batch.teacher, batch.anchors
    )


def loss_inputs(run: Run, batch: LocalBatch, frozen: Frozen, topology: Topology) -> LossInputs:
    """As the trainer makes them, in fp64 and with tiles of a few slots. Collective."""
    target_of = frozen.d2t + torch.arange(DRAFT_VOCABULARY)
    in_vocabulary = torch.isin(torch.arange(VOCABULARY), target_of)
    read = batch.live_row + 1 + torch.arange(SIZE - 1)[:, None]
    contributing = batch.supervised & in_vocabulary[batch.teacher_token][read]
    count = torch.full((SIZE - 1,), float(batch.num_slots), dtype=torch.float64)
    count = summed(contributing.sum(1).double() if run.reduction == "supervised" else count)
    weight = torch.where(count > 0, 0.8 ** torch.arange(SIZE - 1).double() / count.clamp(min=1), 0.0)
    tiles = loss_tiles(
        batch.live_row.numpy(), batch.supervised.numpy(), 20 * DRAFT_VOCABULARY * 8, DRAFT_VOCABULARY, 8
    )
    return LossInputs(
        tiles=tiles,
        teacher=stream_rows(batch.teacher, [tile.rows for tile in tiles], topology.device, torch.float64),
        teacher_head=frozen.head[target_of],
        teacher_token=batch.teacher_token,
        draft_to_target=target_of,
        contributing=contributing,
        supervised=batch.supervised,
        step_weight=weight,
        eps=1e-6,
        loss=KL(),
    )


def summed(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def rank_of_training(run: Run, ring: int, ulysses: int) -> dict[str, Any]:
    """The step's figures and gradients, summed over the ranks. Collective over the world."""
    topology = maybe_setup_distributed(ulysses, ring)
    place, config, (whole, frozen) = topology.place, run.config(), inputs_of(run)
    rule = BlockSupervision(SIZE - 1, run.alignment)
    live = live_slots(LENGTHS, whole.loss_mask, rule, whole.anchors)
    plan = SpanPlan.make(LENGTHS, ring, ulysses, 3, live, run.window)
    batch = prepare_usp_input(pack_of(whole, frozen), plan, place.ring_rank, place.ulysses_rank, rule)
    draft = DFlashModel(config).double()
    draft.load_state_dict(weights_of(config))
    patch_attention(
        draft,
        select_kernel("blockwise", topology.device, torch.float64, HEAD_DIM),
        topology.ulysses_group,
        topology.ring_group,
        run.exchange,
        window=run.window,
    )
    inputs, taps = loss_inputs(run, batch, frozen, topology), LossTaps()
    settings = BlockSettings(SIZE, run.activation, 8 * 3 * (7 * WIDTH + 8 * HIDDEN))
    counted = CollectiveCalls({"ulysses": topology.ulysses_group, "ring": topology.ring_group})
    with ExitStack() as stack:
        stack.enter_context(counted)
        if run.fault:
            stack.enter_context(FAULTS[run.fault]())
        anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        found = draft(
            batch,
            frozen.embedding,
            settings,
            taps.add,
            lambda norm, head: tiled_loss(taps, norm, head, inputs),
            anchor,
        )
        found.total.backward()
    assert anchor.grad is not None
    gradients = {name: weight.grad for name, weight in draft.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {
        "loss": float(summed(found.total.detach().clone())),
        "hits": summed(found.hits.double()),
        "joint_acceptance": summed(found.joint_acceptance.double()),
        "gradients": {name: summed(gradient) for name, gradient in gradients.items() if gradient is not None},
        "own": int(batch.supervised[0].sum()),
        "sent": {key: (count.calls, count.payload) for key, count in counted.counts.items()},
        "shares": (plan.live_per_rank, plan.slots_per_rank),
    }


def expected_of(run: Run) -> StepResult:
    batch, frozen = inputs_of(run)
    return dflash_step(weights_of(run.config()), run.config(), frozen, [batch], run.rules)


def apart(found: dict[str, Any], expected: StepResult) -> dict[str, float]:
    """Relative differences of the loss and of each gradient."""
    assert found["gradients"].keys() == expected.gradients.keys()
    return {
        "loss": abs(found["loss"] / expected.loss - 1),
        **{
            name: float((found["gradients"][name] - gradient).norm() / gradient.norm())
            for name, gradient in expected.gradients.items()
        },
    }


CASES = {
    "one layer": Run(),
    "three layers": Run(3),
    "three layers, repeated": Run(3, "recompute"),
    "by ring, repeated": Run(3, "recompute", exchange="ring"),
    "causal, own mask": Run(3, "recompute", causal=True, own_mask=True),
    "window": Run(3, window=6, own_mask=True),
    "window, causal, by ring": Run(1, "recompute", causal=True, window=6, exchange="ring"),
    "predicted, by slots": Run(3, alignment="predicted", reduction="slots"),
    "one anchor": Run(3, "recompute", share=None, exchange="ring"),
    "every candidate": Run(3, "recompute", share=1.0),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_loss_and_gradients_are_the_references(run_ranks: Any, ring: int, ulysses: int, name: str) -> None:
    run = CASES[name]
    results = run_ranks(ring * ulysses, rank_of_training, run, ring, ulysses)
    expected = expected_of(run)
    for result in results:
        differences = apart(result, expected)
        worst = max(differences, key=lambda key: differences[key])
        assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.2e}"
    without = sum(result["own"] == 0 for result in results)
    assert without == (ring * ulysses - 1 if run.share is None else 0), "ranks without an anchor of their own"


@pytest.mark.ranks
@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_a_layer_sends_what_the_page_says(run_ranks: Any, ring: int, ulysses: int) -> None:
    """The table of docs/dflash.md; entries and statistics are fp64 here."""
    run = Run(3, "recompute")
    for result in run_ranks(ring * ulysses, rank_of_training, run, ring, ulysses):
        (anchors, slots), q, kv = result["shares"], HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
        inputs, context = anchors * SIZE, 2 * slots * kv
        expected = {}
        if ulysses > 1:
            forward = inputs * q + context + inputs * (q + HEADS)
            backward = inputs * (2 * q + 2 * HEADS) + inputs * q + context
            expected["ulysses", "all_to_all"] = (3 * 4, 3 * 8 * (forward + backward))
        if ring > 1:
            expected["ring", "all_gather"] = (3, 3 * 8 * context)
            expected["ring", "reduce_scatter"] = (3, 3 * 8 * ring * context)
        assert result["sent"] == expected


FAULTS = {"future": future_context, "leak": leaking_document, "late": blocks_too_late}


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 2)])
def test_faults_are_rejected(run_ranks: Any, ring: int, ulysses: int, fault: str) -> None:
    run = Run(3)
    (found, *_) = run_ranks(ring * ulysses, rank_of_training, replace(run, fault=fault), ring, ulysses)
    differences = apart(found, expected_of(run))
    assert differences["loss"] > 100 * TOLERANCE
    assert max(differences.values()) > 1e-2
