"""The reference of DFlash judged: blocks whose states can be counted by hand, what a block must not depend
on, and three faults that each change the result.
"""

import pytest
import torch
from transformers import LlamaConfig

import judge.dflash_reference as reference
from judge.dense_reference import Frozen, LossRules, MicroBatch, is_supervised
from judge.dflash_reference import block_logits, dflash_step, sampled_anchors

LENGTHS, SIZE, VOCABULARY, HIDDEN = (7, 9), 4, 23, 8
RULES = LossRules(SIZE - 1)


def config_of(layers=2, **more):
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=12,
        num_hidden_layers=layers, rms_norm_eps=1e-6, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    for name, value in {"block_size": SIZE, "mask_token_id": 0, "block_causal": False, **more}.items():
        setattr(config, name, value)
    return config


def weights_of(layers=2):
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * columns**-0.5

    def norm(size):
        return 1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)

    weights = {"fc.weight": matrix(HIDDEN, 12), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    weights |= {"hidden_norm.weight": norm(HIDDEN), "norm.weight": norm(HIDDEN)}
    shapes = {"q": (16, HIDDEN), "k": (8, HIDDEN), "v": (8, HIDDEN), "o": (HIDDEN, 16)}
    for layer in range(layers):
        of = {f"self_attn.{name}_proj": matrix(*shape) for name, shape in shapes.items()}
        of |= {f"self_attn.{name}_norm": norm(4) for name in "qk"}
        of |= {f"{name}_layernorm": norm(HIDDEN) for name in ("input", "post_attention")}
        of |= {"mlp.gate_proj": matrix(12, 8), "mlp.up_proj": matrix(12, 8), "mlp.down_proj": matrix(8, 12)}
        weights |= {f"layers.{layer}.{name}.weight": tensor for name, tensor in of.items()}
    return weights


def pack_of(mask=None, anchors=None):
    generator = torch.Generator().manual_seed(1)
    length = sum(LENGTHS)
    mask = torch.ones(length, dtype=torch.bool) if mask is None else mask
    anchors = torch.tensor([True, False, False] * 5 + [True]) if anchors is None else anchors
    return MicroBatch(
        torch.randint(1, VOCABULARY, (length,), generator=generator),
        mask,
        LENGTHS,
        torch.randn(length, 12, generator=generator, dtype=torch.float64),
        torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64),
        anchors,
    )


def frozen_of():
    generator = torch.Generator().manual_seed(2)
    embedding, head = (
        torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return Frozen(embedding, head, torch.zeros(VOCABULARY, dtype=torch.int64))


def normed(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize(
    ("more", "first_context", "num_inputs"),
    [
        # (settings, the oldest context position that inputs 0..3 see, how many inputs of the block they see)
        ({}, (0, 0, 0, 0), (4, 4, 4, 4)),
        ({"block_causal": True}, (0, 0, 0, 0), (1, 2, 3, 4)),
        # The inputs stand at positions 4..7; each sees keys of its last 5 positions, its own among them.
        ({"sliding_window": 5}, (0, 1, 2, 3), (4, 4, 4, 4)),
    ],
)
def test_without_queries_an_input_is_its_embedding_and_the_mean_of_what_it_sees(
    more, first_context, num_inputs
):
    """Anchor 3 of the second document: position 3, context of its positions 0..3, inputs at 4..7."""
    config, weights, frozen, batch = config_of(1, **more), weights_of(1), frozen_of(), pack_of()
    mean = torch.zeros(HIDDEN, 16, dtype=torch.float64)
    mean[torch.arange(HIDDEN), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])] = 1
    weights |= {
        "layers.0.self_attn.q_proj.weight": torch.zeros(16, HIDDEN, dtype=torch.float64),
        # A key head's values are four channels of what is read; its first query head writes them back.
        "layers.0.self_attn.v_proj.weight": torch.eye(HIDDEN, dtype=torch.float64),
        "layers.0.self_attn.o_proj.weight": mean,
        "layers.0.mlp.down_proj.weight": torch.zeros(8, 12, dtype=torch.float64),
    }
    start = LENGTHS[0]
    slot = start + 3
    found = block_logits(weights, config, frozen, batch, torch.tensor([slot]))[0]
    context = normed(batch.aux[start : slot + 1] @ weights["fc.weight"].T, weights["hidden_norm.weight"])
    inputs = frozen.embedding[torch.tensor([int(batch.token_ids[slot + 1]), 0, 0, 0])]
    values = normed(inputs, weights["layers.0.input_layernorm.weight"])
    for b in range(SIZE):
        seen = torch.cat((context[first_context[b] :], values[: num_inputs[b]])).mean(0)
        expected = weights["lm_head.weight"] @ normed(inputs[b] + seen, weights["norm.weight"])
        assert torch.allclose(found[b], expected, rtol=0, atol=1e-12), b


def test_a_block_depends_on_its_context_alone():
    config, weights, frozen, batch = config_of(), weights_of(), frozen_of(), pack_of()
    slots = torch.tensor([2, 9])
    before = block_logits(weights, config, frozen, batch, slots)
    for row in range(sum(LENGTHS)):
        batch.aux[row] += 1
        after = block_logits(weights, config, frozen, batch, slots)
        batch.aux[row] -= 1
        changed = [bool((a - b).abs().max() > 1e-9) for a, b in zip(after, before, strict=True)]
        assert changed == [row <= 2, 7 <= row <= 9], row


def test_blocks_do_not_see_each_other():
    config, weights, frozen, batch = config_of(), weights_of(), frozen_of(), pack_of()
    together = block_logits(weights, config, frozen, batch, torch.tensor([1, 2, 3, 12]))
    for n, slot in enumerate((1, 2, 3, 12)):
        alone = block_logits(weights, config, frozen, batch, torch.tensor([slot]))[0]
        assert torch.allclose(together[n], alone, rtol=0, atol=1e-12)


def test_a_mask_embedding_of_its_own_stands_for_the_row():
    config, weights, frozen, batch = config_of(), weights_of(), frozen_of(), pack_of()
    slots = torch.tensor([2])
    plain = block_logits(weights, config, frozen, batch, slots)
    same = block_logits({**weights, "mask_embedding": frozen.embedding[0]}, config, frozen, batch, slots)
    other = block_logits({**weights, "mask_embedding": frozen.embedding[5]}, config, frozen, batch, slots)
    assert torch.equal(plain, same) and not torch.allclose(plain, other)
    result = dflash_step({**weights, "mask_embedding": frozen.embedding[5]}, config, frozen, [batch], RULES)
    assert result.gradients["mask_embedding"].abs().max() > 0


@pytest.mark.parametrize("alignment", ["served", "predicted"])
@pytest.mark.parametrize("reduction", ["supervised", "slots"])
def test_a_pack_equals_its_documents_alone(alignment, reduction):
    rules = LossRules(SIZE - 1, 0.8, alignment, reduction)
    weights, frozen, pack, alone, start = weights_of(), frozen_of(), pack_of(), [], 0
    for length in LENGTHS:
        at = slice(start, start + length)
        parts = (pack.token_ids[at], pack.loss_mask[at], (length,), pack.aux[at], pack.teacher[at])
        alone.append(MicroBatch(*parts, pack.anchors[at]))
        start += length
    packed = dflash_step(weights, config_of(), frozen, [pack], rules)
    split = dflash_step(weights, config_of(), frozen, alone, rules)
    assert packed.loss == pytest.approx(split.loss, abs=1e-12)
    for name, gradient in packed.gradients.items():
        assert torch.allclose(gradient, split.gradients[name], rtol=0, atol=1e-12), name


def test_which_guesses_count():
    """Documents of 7 and 9 tokens; of the first, tokens 3..6 are the assistant's; of the second, 1 and 2."""
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[3, 4, 5, 6, 8, 9]] = True
    batch = pack_of(mask, torch.ones(16, dtype=torch.bool))
    served = [is_supervised(batch, "served", k).nonzero()[:, 0].tolist() for k in range(SIZE - 1)]
    assert served == [[2, 3, 4, 5, 7, 8], [1, 2, 3, 4, 7], [0, 1, 2, 3]]
    predicted = [is_supervised(batch, "predicted", k).nonzero()[:, 0].tolist() for k in range(SIZE - 1)]
    assert predicted == [[2, 3, 4, 7], [2, 3], [2]]


def test_a_block_longer_than_its_documents_rest_counts_as_far_as_it_reaches():
    anchors = torch.zeros(16, dtype=torch.bool)
    anchors[4] = True
    result = dflash_step(weights_of(), config_of(), frozen_of(), [pack_of(None, anchors)], RULES)
    # Guess 0 has its teacher in row 5, guess 1 in row 6, the last one; guess 2 has none.
    assert result.step_loss[0] > 0 and result.step_loss[1] > 0 and result.step_loss[2] == 0


def test_anchors_are_a_share_of_the_candidates_by_their_keys():
    # The first number that SplitMix64 gives for seed 0, as its author's code prints it.
    assert reference._mixed(0) == 0xE220A8397B1DCDAF
    batch = pack_of()
    chosen = sampled_anchors(batch, RULES, 0.4, 5, 0, (11, 12))
    candidates = is_supervised(pack_of(None, torch.ones(16, dtype=torch.bool)), "served", 0)
    assert not (chosen & ~candidates).any()
    assert (int(chosen[:7].sum()), int(chosen[7:].sum())) == (3, 4), "ceil(0.4 * 6), ceil(0.4 * 8)"


def test_anchors_of_a_document_do_not_depend_on_its_pack():
    pack, mask = pack_of(None, torch.ones(16, dtype=torch.bool)), torch.ones(16, dtype=torch.bool)
    second = MicroBatch(pack.token_ids[7:], mask[7:], (9,), pack.aux[7:], pack.teacher[7:])
    together = sampled_anchors(pack, RULES, 0.5, 5, 0, (11, 12))[7:]
    assert torch.equal(together, sampled_anchors(second, RULES, 0.5, 5, 0, (12,)))
    other_visits = [sampled_anchors(second, RULES, 0.5, 5, visit, (12,)) for visit in range(1, 6)]
    assert any(not torch.equal(together, other) for other in other_visits)
    everything = sampled_anchors(second, RULES, 1.0, 5, 0, (12,))
    assert everything.tolist() == [True] * 8 + [False], "the last slot has no teacher"


def future(config, document, position, slots, at, honest=reference._seen):
    """A block that sees the hidden state of its own first token."""
    seen = honest(config, document, position, slots, at)
    anchor = slots.repeat_interleave(config.block_size)
    inside = document[(anchor + 1).clamp(max=len(document) - 1)] == document[anchor]
    seen[torch.arange(len(at))[inside], anchor[inside] + 1] = True
    return seen


def other_documents(config, document, position, slots, at, honest=reference._seen):
    """A block that sees the whole pack before it."""
    return honest(config, torch.zeros_like(document), position, slots, at)


def shifted(config, document, position, slots, at, honest=reference._seen):
    """Positions of the blocks off by one: `at` is what the layers read, too."""
    at += 1
    return honest(config, document, position, slots, at)


@pytest.mark.parametrize("fault", [future, other_documents, shifted])
def test_faults_change_the_loss_and_the_gradients(fault, monkeypatch):
    arguments = (weights_of(), config_of(), frozen_of(), [pack_of()], RULES)
    right = dflash_step(*arguments)
    monkeypatch.setattr(reference, "_seen", fault)
    wrong = dflash_step(*arguments)
    assert abs(wrong.loss - right.loss) > 1e-4
    apart = [(wrong.gradients[n] - g).norm() / g.norm() for n, g in right.gradients.items()]
    assert max(apart) > 1e-2


@pytest.mark.parametrize(
    ("more", "batch", "words"),
    [
        ({"block_size": 5}, pack_of(), "ttt_steps = 3, but a block of 5"),
        ({"sliding_window": 3}, pack_of(), "sliding_window = 3 does not hold a block of 4"),
        ({}, MicroBatch(*list(vars(pack_of()).values())[:5]), "no anchors"),
    ],
)
def test_what_does_not_fit_is_refused(more, batch, words):
    with pytest.raises(ValueError, match=words):
        dflash_step(weights_of(), config_of(**more), frozen_of(), [batch], RULES)
