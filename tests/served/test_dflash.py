"""What docs/dflash.md says that a server computes, held against vLLM: of every block that it drafts, the
tokens and positions that go in and the logits that come out, beside the dense reference's.

The reference reads the hidden states that this package captures of the target's own greedy text, so the
layers that vLLM captures, and which of its positions a block sees, are judged too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.eval import decode_alone
from eagle3_ds.targets import Target, capture_hidden_states, choose_aux_layers
from judge.dense_reference import Frozen, MicroBatch
from judge.dflash_reference import block_logits
from tests.served.dflash_drafts import (
    AUX_LAYERS,
    SIZE,
    DraftForm,
    draft_config,
    random_weights,
    trained,
    write_draft,
)
from tests.served.pairs import random_target

WATCHED = Path(__file__).with_name("dflash_by_vllm.py")
NEW_TOKENS, LEARNT, CLOSE = 32, 9, 1e-5
CAUSAL, WINDOW = {"block_causal": True}, {"sliding_window": 8}
SLIDES = {"use_swa": True, "swa_window_size": 8}
UNMENDED = "norms of layers differ, as vLLM has them"
FORMS = {
    "plain": DraftForm(dflash={"causal": False}),
    "no word of causal": DraftForm(),
    "causal": DraftForm(CAUSAL, {"causal": True}),
    "window": DraftForm(WINDOW, {"causal": False, **SLIDES}),
    "causal window": DraftForm(CAUSAL | WINDOW, {"causal": True, **SLIDES}),
    "smaller vocabulary": DraftForm(dflash={"causal": False}, vocabulary=200),
    "mask embedding of its own": DraftForm(dflash={"causal": False}, own_mask=True),
    "the target's head": DraftForm(dflash={"causal": False}, own_head=False),
    "speculators layout": DraftForm(speculators={"sliding_window_non_causal": True}),
    # What speculators 0.9 writes of a draft that it has trained without a window, hence non-causal.
    "speculators layout as speculators writes it": DraftForm(
        CAUSAL, speculators={"sliding_window_non_causal": False}
    ),
    "norms of layers differ": DraftForm(dflash={"causal": False}, norms_differ=True),
    UNMENDED: DraftForm(dflash={"causal": False}, norms_differ=True),
    # vLLM does not look at block_size: a shorter block is one of fewer masks.
    "fewer guesses": DraftForm({"block_size": 4}, {"causal": False}, draft_tokens=3),
}


class Served(NamedTuple):
    """A draft as the reference reads it."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    frozen: Frozen


class Bench(NamedTuple):
    """texts: each prompt with the target's own greedy answer and a block more, whose hidden states are known;
    prompts: how many tokens of each are the prompt; found: what vLLM did, by draft.
    """

    texts: list[MicroBatch]
    prompts: list[int]
    drafts: dict[str, Served]
    found: dict[str, Any]


def texts_of(target: Target, vocabulary: int) -> tuple[list[MicroBatch], list[int]]:
    generator = torch.Generator().manual_seed(1)
    texts, lengths = [], [3 + 4 * (i % 6) for i in range(LEARNT + 3)]
    for length in lengths:
        prompt = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        text = torch.tensor(prompt + decode_alone(target, prompt, NEW_TOKENS + SIZE, None))
        answer = torch.arange(len(text)) >= length
        aux, teacher = capture_hidden_states(target, text)
        texts.append(MicroBatch(text, answer, (len(text),), aux, teacher, answer.roll(-1)))
    return texts, lengths


def served_draft(form: DraftForm, target: Target, texts: list[MicroBatch]) -> Served:
    """A draft that some of the texts have trained."""
    head = target.model.lm_head.weight.detach()
    config = draft_config(target.config, **form.keys)
    vocabulary = form.vocabulary or config.vocab_size
    shuffled = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(6))
    kept = shuffled[:vocabulary].sort().values
    frozen = Frozen(target.embedding, head, kept - torch.arange(vocabulary))
    weights = random_weights(config, texts[0].aux.shape[1], vocabulary, form.own_mask, form.norms_differ)
    weights["lm_head.weight"] = head[kept].clone() if not form.own_head else weights["lm_head.weight"]
    return Served(config, trained(weights, config, frozen, texts), frozen)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, run_there: Callable[..., str]) -> Bench:
    folder = tmp_path_factory.mktemp("dflash")
    model = random_target(folder / "target", "llama")
    layers = choose_aux_layers(model.config.num_hidden_layers, AUX_LAYERS)
    target = Target(model, None, model.config, layers)
    texts, lengths = texts_of(target, model.config.vocab_size)
    drafts, engines, made = {}, [], {}
    for name, form in FORMS.items():
        weights_of = str((form.keys, form.vocabulary, form.own_mask, form.norms_differ, form.own_head))
        if weights_of not in made:
            made[weights_of] = served_draft(form, target, texts[:LEARNT])
        drafts[name] = made[weights_of]
        config, weights, frozen = drafts[name]
        write_draft(folder / name, form, config, weights, frozen.d2t if form.vocabulary else None)
        engine = {"name": name, "model": str(folder / "target"), "draft": str(folder / name)}
        mended = form.norms_differ and name != UNMENDED
        engines.append({**engine, "draft_tokens": form.draft_tokens, "mended": mended})
    # Two texts that the drafts have learnt, so that guesses are accepted, and three that they have not.
    judged = slice(LEARNT - 2, None)
    prompts = [text.token_ids[:n].tolist() for text, n in zip(texts[judged], lengths[judged], strict=True)]
    jobs = {"prompts": prompts, "max_new_tokens": NEW_TOKENS, "engines": engines}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_there(WATCHED, folder / "jobs.json", folder / "answers.json")
    found = json.loads((folder / "answers.json").read_text())
    return Bench(texts[judged], lengths[judged], drafts, found)


def expected_logits(served: Served, text: MicroBatch, slots: list[int]) -> Tensor:
    """What the reference says of the blocks of anchors, fp64 [A, K, Vd]."""
    weights = {name: weight.double() for name, weight in served.weights.items()}
    return block_logits(weights, served.config, served.frozen, text, torch.tensor(slots))[:, 1:]


@pytest.mark.parametrize("name", [name for name in FORMS if name != UNMENDED])
def test_vllm_computes_the_blocks_of_the_page(name: str, bench: Bench) -> None:
    served, found = bench.drafts[name], bench.found[name]
    assert "error" not in found, found["error"]
    size, mask = served.config.block_size, served.config.mask_token_id
    target_of = torch.arange(len(served.frozen.d2t)) + served.frozen.d2t
    accepted = rounds = 0
    apart = []
    for text, start, answer, calls in zip(
        bench.texts, bench.prompts, found["answers"], found["calls"], strict=True
    ):
        assert answer == text.token_ids[start : start + NEW_TOKENS].tolist(), "the target's own greedy text"
        slots = [call["positions"][0] - 1 for call in calls]
        expected = expected_logits(served, text, slots)
        for n, (slot, call) in enumerate(zip(slots, calls, strict=True)):
            assert call["tokens"] == [int(text.token_ids[slot + 1])] + [mask] * (size - 1)
            assert call["positions"] == list(range(slot + 1, slot + 1 + size))
            theirs = torch.tensor(
                [[-torch.inf if x is None else x for x in row] for row in call["logits"]]
            ).double()
            others = torch.ones(theirs.shape[1], dtype=torch.bool)
            others[target_of] = False
            assert theirs[:, others].isinf().all()
            apart.append(float((theirs[:, target_of] - expected[n]).abs().max() / expected[n].abs().max()))
            assert torch.equal(theirs.argmax(1), target_of[expected[n].argmax(1)])
        # A block follows each verification: its anchor's step says what was accepted of the block before.
        assert slots[0] == start - 1
        accepted += sum(b - a - 1 for a, b in zip(slots, slots[1:], strict=False))
        rounds += len(slots) - 1
    print(f"{name}: {rounds} rounds, {accepted} accepted, logits apart by {max(apart):.1e} at most")
    assert max(apart) <= CLOSE
    assert 0 < accepted < rounds * (size - 1), "a draft that is always or never right would prove little"


def test_vllm_on_a_cpu_norms_context_keys_of_all_layers_by_the_first_ones_weight(bench: Bench) -> None:
    """When this fails vLLM mended it; docs/dflash.md then says so no more and `mend_context_norms` goes."""
    config, weights, frozen = bench.drafts[UNMENDED]
    text, calls = bench.texts[-1], bench.found[UNMENDED]["calls"][-1]
    expected = expected_logits(
        Served(config, weights, frozen), text, [call["positions"][0] - 1 for call in calls]
    )
    theirs = torch.tensor([call["logits"] for call in calls]).double()
    assert float((theirs - expected).abs().max() / expected.abs().max()) > 10 * CLOSE


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"block_causal": True}, 1e-2),
        ({"sliding_window": SIZE}, 1e-2),
        ({"mask_token_id": 4}, 1e-2),
        ({"block_size": SIZE + 1}, 1e-3),
    ],
)
def test_the_comparison_sees_other_settings(change: dict[str, Any], least: float, bench: Bench) -> None:
    """Of the plain draft, the reference with another setting is not what vLLM computes."""
    config, weights, frozen = bench.drafts["plain"]
    settings = {"block_causal": False, "mask_token_id": 3, **change}
    other = Served(draft_config(config, **settings), weights, frozen)
    text, calls = bench.texts[-1], bench.found["plain"]["calls"][-1]
    slots = [call["positions"][0] - 1 for call in calls]
    expected = expected_logits(other, text, slots)[:, : SIZE - 1]
    theirs = torch.tensor([call["logits"] for call in calls]).double()
    assert float((theirs - expected).abs().max() / expected.abs().max()) > least
