"""Our own exports of DFlash drafts in a real vLLM: what it answers is the target's own text, and what it
accepts of the draft is, prompt for prompt and position for position, what our own decoding accepts.

Norms differ by layer, which vLLM 0.32 on a CPU does not see until serving/decode.py has mended it
(docs/dflash.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.dflash import DFlashModel, build_dflash_config
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import VocabularyMap, project_embedding
from eagle3_ds.eval import Round, speculative_decode
from eagle3_ds.export import export_speculators, export_vllm
from eagle3_ds.targets import Target, choose_aux_layers
from judge.dense_reference import Frozen
from tests.served.dflash_drafts import AUX_LAYERS, SIZE, random_weights, trained
from tests.served.judged import ALONE, DRAFT, SPECULATORS, Serve
from tests.served.pairs import VOCABULARY, random_target
from tests.served.test_dflash import LEARNT, NEW_TOKENS, texts_of

GUESSES, TRAIN_STEPS = SIZE - 1, 150
COMMON: dict[str, Any] = {"algorithm": "dflash", "block_size": SIZE, "mask_token_id": 3, "num_layers": 1}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"vocab_size": VOCABULARY},
    "smaller vocabulary": {"vocab_size": 200},
    "two layers": {"vocab_size": 200, "num_layers": 2},
    "causal": {"vocab_size": 200, "block_causal": True},
    "window": {"vocab_size": 200, "sliding_window": 8},
    "causal window": {"vocab_size": 200, "sliding_window": 8, "block_causal": True},
    "another width": {"vocab_size": 200, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2},
    "mask embedding": {"vocab_size": 200, "mask_embedding": True},
}
CASES = [
    (form, way) for form in FORMS for way in ((DRAFT, SPECULATORS, ALONE)[: 3 if form == "plain" else 2])
]


class Bench(NamedTuple):
    """answers: the target's own; rounds: ours, by form; found: what vLLM did, by form and way."""

    answers: list[list[int]]
    rounds: dict[str, list[list[Round]]]
    found: dict[str, Any]


class Made(NamedTuple):
    """A draft, its vocabulary, and its embedding: the target's, or its own of another width."""

    draft: DFlashModel
    vocabulary: VocabularyMap
    embedding: Tensor


def trained_draft(target: Target, texts: list[Any], more: dict[str, Any]) -> Made:
    """A draft that the dense reference has trained for a few steps."""
    section = DraftSection(**{**COMMON, **more})
    config = build_dflash_config(target.config, section, target.aux_layers)
    tokens = torch.cat([text.token_ids for text in texts])
    counts = torch.bincount(tokens, minlength=config.vocab_size)
    vocabulary = VocabularyMap.from_counts(counts, section.vocab_size)
    draft = DFlashModel(config).eval()
    sizes = (draft.fc.in_features, section.vocab_size, section.mask_embedding)
    embedding = target.embedding
    if config.hidden_size != embedding.shape[1]:
        embedding = project_embedding(embedding, config.hidden_size)
    frozen = Frozen(embedding, target.head, vocabulary.d2t)
    fresh = random_weights(config, *sizes, norms_differ=True)
    draft.load_state_dict(trained(fresh, config, frozen, texts, TRAIN_STEPS, still=()))
    return Made(draft.requires_grad_(False), vocabulary, embedding)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Bench:
    folder: Path = tmp_path_factory.mktemp("dflash_exports")
    model = random_target(folder / "target", "llama")
    layers = choose_aux_layers(model.config.num_hidden_layers, AUX_LAYERS)
    target = Target(model, None, model.config, layers)
    texts, lengths = texts_of(target, model.config.vocab_size)
    # Four texts that the drafts have learnt, so that guesses are accepted, and two that they have not.
    judged = range(LEARNT - 4, LEARNT + 2)
    prompts = [texts[i].token_ids[: lengths[i]].tolist() for i in judged]
    answers = [texts[i].token_ids[lengths[i] : lengths[i] + NEW_TOKENS].tolist() for i in judged]
    rounds: dict[str, list[list[Round]]] = {}
    engines: list[dict[str, Any]] = []
    for form, more in FORMS.items():
        draft, vocabulary, embedding = trained_draft(target, texts[:LEARNT], more)
        common = (draft.state_dict(), draft.config, vocabulary)
        brought = None if embedding is target.embedding else embedding
        own = export_vllm(*common, folder / form / "vllm", "float32", algorithm="dflash", embedding=brought)
        theirs = export_speculators(
            *common,
            embedding,
            folder / form / "speculators",
            str(folder / "target"),
            [type(model).__name__],
            "float32",
            draft_tokens=GUESSES,
            algorithm="dflash",
        )
        given = {
            DRAFT: (folder / "target", str(own)),
            SPECULATORS: (folder / "target", str(theirs)),
            ALONE: (theirs, None),
        }
        for way in (way for of, way in CASES if of == form):
            engine = {
                "model": str(given[way][0]),
                "draft": given[way][1],
                "speculative": {"method": "dflash"},
            }
            engines.append({"name": f"{form}, {way}", **engine})
        rounds[form] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            guesser = ALGORITHMS["dflash"].guesser(draft, embedding, vocabulary)
            decoded = speculative_decode(target, guesser, prompt, NEW_TOKENS, GUESSES, None, answer)
            rounds[form].append(decoded[1])
    jobs = {"prompts": prompts, "max_new_tokens": NEW_TOKENS, "draft_tokens": GUESSES, "dtype": "float32"}
    found = serve({**jobs, "max_model_len": 256, "engines": engines}, folder)
    return Bench(answers, rounds, found)


def counted(rounds: list[Round]) -> dict[str, Any]:
    """Our rounds of one prompt as vLLM counts them."""
    return {
        "rounds": len(rounds),
        "guessed": len(rounds) * GUESSES,
        "accepted": sum(each.accepted for each in rounds),
        "accepted_by_position": [sum(each.accepted > k for each in rounds) for k in range(GUESSES)],
    }


@pytest.mark.parametrize(("form", "way"), CASES, ids=map(", ".join, CASES))
def test_vllm_answers_and_accepts_as_we_do(form: str, way: str, bench: Bench) -> None:
    found = bench.found[f"{form}, {way}"]
    assert "error" not in found, found["error"]
    assert found["answers"] == bench.answers, "the target's own greedy text"
    assert found["counts"] == [counted(rounds) for rounds in bench.rounds[form]]
    accepted, guessed = (sum(each[name] for each in found["counts"]) for name in ("accepted", "guessed"))
    print(f"{form}, {way}: {accepted} of {guessed} guesses accepted")
    assert 0.02 < accepted / guessed < 0.9, "a draft that is always or never right would prove little"
