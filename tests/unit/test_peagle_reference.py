"""The reference of P-EAGLE judged: by what a server computes token by token, by its documents one by one, by
counts made by hand, and by faults that must change its result.
"""

import pytest
import torch

from judge import peagle_reference
from judge.cases import HIDDEN, Case, Inputs, make_inputs
from judge.dense_reference import (
    LossRules,
    MicroBatch,
    after_attention,
    before_attention,
    normed_aux,
    reference_step,
    rms_norm,
    rotary_frequencies,
)
from judge.peagle_reference import peagle_guesses, peagle_step, visible_keys

MASK_TOKEN = 3


def inputs_of(documents: str, norms: str = "none", **factors) -> tuple[Inputs, dict[str, torch.Tensor]]:
    inputs = make_inputs(Case(documents=documents, norms=norms, **factors))
    inputs.config.mask_token_id = MASK_TOKEN
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    generator = torch.Generator().manual_seed(5)
    for name, size in (
        ("mask_embedding", inputs.config.hidden_size),
        ("mask_hidden", inputs.config.num_aux_layers * HIDDEN),
    ):
        weights[name] = torch.randn(size, generator=generator).double()
    return inputs, weights


def first_batch(inputs: Inputs) -> MicroBatch:
    return inputs.steps[0][0][0]


def tail_of_a_causal_pass(inputs, weights, batch, slot, guesses):
    """What a server computes that has verified slots 0..slot of one document: one causal pass over these and
    K - 1 masks behind them. Logits [K, Vd].
    """
    config = inputs.config
    tokens = batch.token_ids[1 : slot + 2]
    embeds = inputs.frozen.embedding.double()[tokens]
    embeds[tokens == MASK_TOKEN] = weights["mask_embedding"]
    embeds = torch.cat((embeds, weights["mask_embedding"].repeat(guesses - 1, 1)))
    aux = torch.cat((batch.aux[: slot + 1].double(), weights["mask_hidden"].repeat(guesses - 1, 1)))
    hidden = normed_aux(weights, config, aux) @ weights["fc.weight"].T
    angle = torch.arange(len(embeds))[:, None] * rotary_frequencies(config)
    seen = torch.ones(len(embeds), len(embeds)).tril().bool()
    window = getattr(config, "sliding_window", None)
    if window:
        seen &= ~torch.ones(len(embeds), len(embeds)).tril(-window).bool()
    for layer in range(config.num_hidden_layers):
        q, k, v = before_attention(weights, config, layer, embeds, hidden, angle)
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        hidden = after_attention(weights, config, layer, hidden, attended.transpose(0, 1).flatten(1))
    return (rms_norm(hidden, weights["norm.weight"], config) @ weights["lm_head.weight"].T)[-guesses:]


@pytest.mark.parametrize("norms", ["none", "all"])
@pytest.mark.parametrize(("layers", "window"), [(1, None), (2, None), (2, 24), (1, 2)])
def test_a_guess_is_what_a_causal_pass_computes(layers, window, norms):
    """A window of 2 is smaller than the chain: it hides the oldest masks and all context."""
    inputs, weights = inputs_of("one", norms, layers=layers, window=window)
    batch = first_batch(inputs)
    guesses = torch.stack(peagle_guesses(weights, inputs.config, inputs.frozen, batch, 4))
    for slot in (0, 1, 5, 40, len(batch.token_ids) - 2):
        expected = tail_of_a_causal_pass(inputs, weights, batch, slot, 4)
        assert torch.allclose(guesses[:, slot], expected, rtol=0, atol=1e-12), slot


def test_one_guess_is_step_zero_of_eagle3():
    inputs, weights = inputs_of("many_unaligned", layers=2)
    rules, batches = LossRules(1), [first_batch(inputs)]
    ours = peagle_step(weights, inputs.config, inputs.frozen, batches, rules)
    eagle3 = {name: weight for name, weight in weights.items() if not name.startswith("mask_")}
    expected = reference_step(eagle3, inputs.config, inputs.frozen, batches, rules)
    assert ours.loss == pytest.approx(expected.loss, rel=1e-12)
    for name, gradient in expected.gradients.items():
        assert torch.allclose(ours.gradients[name], gradient, rtol=1e-10, atol=1e-15), name
    assert not ours.gradients["mask_hidden"].any()


def test_visible_keys_by_hand():
    """Documents of two slots and of one, two guesses. Rows and columns: guess 0 in slots 0, 1, 2, then 1."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]
    document = torch.tensor([0, 0, 1])
    assert visible_keys(document, 2).int().tolist() == expected
    # A window of two: guess 1 in slot 1 stands at position 2 and looks back to position 1.
    expected[4] = [0, 1, 0, 0, 1, 0]
    assert visible_keys(document, 2, window=2).int().tolist() == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_a_pack_equals_its_documents_alone(layers):
    inputs, weights = inputs_of("many_unaligned", "all", layers=layers)
    rules, pack = LossRules(4), first_batch(inputs)
    alone, start = [], 0
    for length in pack.lengths:
        rows = slice(start, start + length)
        parts = (pack.token_ids[rows], pack.loss_mask[rows], (length,), pack.aux[rows], pack.teacher[rows])
        alone.append(MicroBatch(*parts))
        start += length
    packed = peagle_step(weights, inputs.config, inputs.frozen, [pack], rules)
    split = peagle_step(weights, inputs.config, inputs.frozen, alone, rules)
    assert packed.step_loss == pytest.approx(split.step_loss, rel=1e-12)
    assert packed.step_accuracy == split.step_accuracy
    assert packed.tau == pytest.approx(split.tau, rel=1e-12)
    for name, gradient in packed.gradients.items():
        assert (gradient - split.gradients[name]).norm() <= 1e-12 * gradient.norm(), name


def test_loss_and_accuracy_by_hand():
    """A draft whose logits are all equal says token 0; each guess costs log 3.

    Documents of five slots and of two. The mask is true at 2, 4 and 6. Guess 0 reads slot i + 1: slots 1, 3
    and 5 count. Guess 1 reads i + 2: slots 0 and 2. The target says 0 at 2, 1 at 4, 5 at 6; 5 lies outside
    the draft vocabulary: no loss, a miss.
    """
    inputs, weights = inputs_of("one")
    head = torch.zeros(6, HIDDEN, dtype=torch.float64)
    head[:, :6] = torch.eye(6)
    frozen = type(inputs.frozen)(torch.randn(6, HIDDEN), head, torch.zeros(3, dtype=torch.int64))
    mask = torch.tensor([0, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    teacher = 5.0 * head[torch.tensor([1, 1, 0, 5, 1, 0, 5])]
    weights["lm_head.weight"] = torch.zeros(3, HIDDEN, dtype=torch.float64)
    aux = torch.randn(7, 3 * HIDDEN)
    batch = MicroBatch(torch.zeros(7, dtype=torch.int64), mask, (5, 2), aux, teacher)
    result = peagle_step(weights, inputs.config, frozen, [batch], LossRules(2, decay=0.5))
    uniform = torch.tensor(3.0).log().item()
    assert result.step_loss == pytest.approx((uniform, uniform))
    assert result.loss == pytest.approx(1.5 * uniform)
    assert result.step_accuracy == (1 / 3, 1 / 2)


def test_the_mask_token_in_a_text_reads_the_learned_row():
    inputs, weights = inputs_of("one")
    batch = first_batch(inputs)
    batch.token_ids[9] = MASK_TOKEN
    before = peagle_guesses(weights, inputs.config, inputs.frozen, batch, 1)[0]
    inputs.frozen.embedding[MASK_TOKEN] += 1.0
    after = peagle_guesses(weights, inputs.config, inputs.frozen, batch, 1)[0]
    assert torch.equal(before, after)
    weights["mask_embedding"] = weights["mask_embedding"] + 1.0
    moved = peagle_guesses(weights, inputs.config, inputs.frozen, batch, 1)[0]
    assert torch.equal(moved[:8], before[:8]) and not torch.equal(moved[8], before[8])


def leaking(document, guesses, window=None):
    return visible_keys(torch.zeros_like(document), guesses, window)


def sees_later_masks(document, guesses, window=None):
    length = len(document)
    slot = torch.arange(length).repeat(guesses)
    later = (slot[:, None] == slot[None, :]) & (torch.arange(len(slot)) >= length)[None, :]
    return visible_keys(document, guesses, window) | later


def without_its_chain(document, guesses, window=None):
    length = len(document)
    own = torch.eye(guesses * length, dtype=torch.bool)
    context = torch.arange(guesses * length) < length
    return visible_keys(document, guesses, window) & (context[None, :] | own)


@pytest.mark.parametrize("fault", [leaking, sees_later_masks, without_its_chain])
def test_wrong_keys_change_the_result(fault, monkeypatch):
    inputs, weights = inputs_of("many_unaligned", layers=2)
    batch = first_batch(inputs)
    before = peagle_step(weights, inputs.config, inputs.frozen, [batch], LossRules(4))
    monkeypatch.setattr(peagle_reference, "visible_keys", fault)
    after = peagle_step(weights, inputs.config, inputs.frozen, [batch], LossRules(4))
    assert max(abs(a / b - 1) for a, b in zip(after.step_loss, before.step_loss, strict=True)) > 1e-4
    difference = after.gradients["fc.weight"] - before.gradients["fc.weight"]
    assert difference.norm() > 1e-3 * before.gradients["fc.weight"].norm()


def test_positions_off_by_one_change_the_result(monkeypatch):
    """Masks that stand where their slot stands: a shift of all positions alike would change nothing."""
    inputs, weights = inputs_of("many_unaligned")
    batch = first_batch(inputs)
    before = peagle_step(weights, inputs.config, inputs.frozen, [batch], LossRules(4))
    length = len(batch.token_ids)
    real = peagle_reference.before_attention

    def shifted(weights, config, layer, embeds, hidden, angle):
        moved = angle.clone()
        moved[length:] -= rotary_frequencies(config)
        return real(weights, config, layer, embeds, hidden, moved)

    monkeypatch.setattr(peagle_reference, "before_attention", shifted)
    after = peagle_step(weights, inputs.config, inputs.frozen, [batch], LossRules(4))
    assert after.step_loss[0] == before.step_loss[0]
    assert all(a != b for a, b in zip(after.step_loss[1:], before.step_loss[1:], strict=True))
    query = "layers.0.self_attn.q_proj.weight"
    difference = after.gradients[query] - before.gradients[query]
    assert difference.norm() > 1e-3 * before.gradients[query].norm()


def test_every_weight_has_a_gradient():
    inputs, weights = inputs_of("many_unaligned", "all", layers=2)
    result = peagle_step(weights, inputs.config, inputs.frozen, [first_batch(inputs)], LossRules(3))
    assert result.gradients.keys() == weights.keys()
    assert all(gradient.norm() > 0 for gradient in result.gradients.values())
