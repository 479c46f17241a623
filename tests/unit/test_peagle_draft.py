"""P-EAGLE drafts: their config, what they guess when served, and their exports.

The guesses are compared with judge/peagle_reference.py, with which training agrees too (judge.exactness).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.peagle import PEagleModel, PEagleShape, build_draft_config, draft_notes
from eagle3_ds.config import DraftSection, Recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_speculators, export_vllm, load_export, verify_export, vllm_tensors
from eagle3_ds.export.card import vllm_words
from eagle3_ds.export.folder import algorithm_of_folder
from judge.dense_reference import Frozen, MicroBatch
from judge.peagle_reference import peagle_guesses

V, VD, H, LENGTH, K, MASK = 50, 32, 16, 14, 4, 9
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "window": {"sliding_window": 5},
    "norms": {"aux_norm": True, "norm_before_fc": True, "norm_before_residual": True},
}


def target_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return LlamaConfig(**sizes | changes)


def make_draft(variant: str = "plain") -> PEagleModel:
    torch.manual_seed(0)
    section = DraftSection(
        algorithm="peagle", vocab_size=VD, ttt_steps=K, mask_token_id=MASK, **VARIANTS[variant]
    )
    draft = PEagleModel(build_draft_config(target_config(), section))
    for parameter in draft.parameters():
        # Large enough for the non-linear parts to matter, and norms that are not one.
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return draft.eval().requires_grad_(False)


def rows_of(seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Tokens, the mask token among them, and captured states of a text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (length,), generator=generator)
    tokens[3] = MASK
    return tokens, torch.randn(length, 3 * H, generator=generator)


def a_vocabulary() -> VocabularyMap:
    return VocabularyMap.from_counts(torch.arange(V), VD)


def expected_guesses(draft: PEagleModel, embedding: Tensor, tokens: Tensor, aux: Tensor) -> Tensor:
    """The reference's guesses in every slot, ids of the target, int64 [K, L]."""
    vocabulary = a_vocabulary()
    frozen = Frozen(embedding, torch.zeros(V, H), vocabulary.d2t)
    length = len(tokens)
    batch = MicroBatch(tokens, torch.ones(length).bool(), (length,), aux, torch.zeros(length, H))
    weights = {name: tensor.double() for name, tensor in draft.state_dict().items()}
    logits = torch.stack(peagle_guesses(weights, draft.config, frozen, batch, K))
    return vocabulary.draft_to_target[logits.argmax(-1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_served_draft_guesses_what_the_reference_does(variant: str) -> None:
    """Round after round: the masks of one round must be gone in the next."""
    draft, embedding = make_draft(variant), torch.randn(V, H)
    tokens, aux = rows_of(1)
    wanted = expected_guesses(draft, embedding, tokens, aux)
    guesser = ALGORITHMS["peagle"].guesser(draft, embedding, a_vocabulary())
    taken = 0
    for step in (6, 1, 3, 2):
        new = slice(taken, taken + step)
        taken += step
        found = guesser.propose(aux[new], tokens[new.start + 1 : new.stop + 1].tolist(), K)
        assert found == wanted[:, taken - 1].tolist()


def test_texts_of_a_batch_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, embedding = make_draft("two layers"), torch.randn(V, H)
    texts = {number: rows_of(number, LENGTH + number) for number in (0, 1, 2)}
    wanted = {n: expected_guesses(draft, embedding, *rows) for n, rows in texts.items()}
    # A prompt longer than a piece is taken in by several.
    monkeypatch.setattr("eagle3_ds.algorithms.eagle3.decoding.PIECE", 4)
    guesser = ALGORITHMS["peagle"].batch_guesser(draft, embedding, a_vocabulary(), 3)
    taken = dict.fromkeys(texts, 0)
    for steps in ({0: 5, 1: 9, 2: 1}, {0: 1, 2: 4}, {1: 2, 2: 1}):
        aux, tokens = {}, {}
        for text, step in steps.items():
            new = slice(taken[text], taken[text] + step)
            taken[text] += step
            aux[text] = texts[text][1][new]
            tokens[text] = texts[text][0][new.start + 1 : new.stop + 1].tolist()
        found = guesser.propose(aux, tokens, K)
        assert found == {text: wanted[text][:, taken[text] - 1].tolist() for text in steps}


def written(draft: PEagleModel, layout: str, folder: Path, embedding: Tensor) -> Path:
    state, vocabulary = draft.state_dict(), a_vocabulary()
    if layout == "vllm":
        return export_vllm(
            state, draft.config, vocabulary, folder, "float32", algorithm="peagle", embedding=embedding
        )
    return export_speculators(
        state, draft.config, vocabulary, embedding, folder, "org/t", ["L"], "float32", algorithm="peagle"
    )


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_an_export_holds_the_learned_row_and_goes_back(layout: str, tmp_path: Path) -> None:
    draft, vocabulary = make_draft("norms"), a_vocabulary()
    # Of a coarser dtype than the draft's, as targets are: the learned row must not be rounded to it.
    embedding = torch.randn(V, H).bfloat16()
    folder = written(draft, layout, tmp_path / "draft", embedding)
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["embed_tokens.weight"]
    assert torch.equal(rows[MASK], draft.mask_embedding)
    others = torch.arange(V) != MASK
    assert torch.equal(rows[others], embedding[others].float())
    assert tensors["mask_hidden"].shape == (1, 1, 3 * H) and "mask_embedding" not in tensors
    keys = json.loads((folder / "config.json").read_text())
    assert keys["ptd_token_id" if layout == "vllm" else "mask_token_id"] == MASK
    architecture = "LlamaForCausalLMEagle3" if layout == "vllm" else "PEagleSpeculator"
    assert keys["architectures"] == [architecture]
    found = algorithm_of_folder(folder)
    assert found is not None and found.name == "peagle"
    config, state, _ = load_export(folder)
    assert config.mask_token_id == MASK
    assert all(torch.equal(state[name], tensor) for name, tensor in draft.state_dict().items())
    assert verify_export(folder, draft, vocabulary, algorithm="peagle", embedding=embedding) == 0.0
    with pytest.raises(ValueError, match="another embedding than the draft was trained with"):
        verify_export(folder, draft, vocabulary, algorithm="peagle", embedding=embedding + 1)


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
@pytest.mark.parametrize("lost", ["mask_hidden", "embed_tokens.weight"])
def test_an_export_without_its_masks_is_refused(layout: str, lost: str, tmp_path: Path) -> None:
    folder = written(make_draft(), layout, tmp_path / "draft", torch.randn(V, H))
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=lost):
        load_export(folder)


def test_an_eagle3_draft_is_none_of_peagle(tmp_path: Path) -> None:
    draft = ALGORITHMS["eagle3"].build(make_draft().config)
    folder = export_vllm(draft.state_dict(), draft.config, a_vocabulary(), tmp_path / "draft")
    found = algorithm_of_folder(folder)
    assert found is not None and found.name == "eagle3"


def test_a_pushed_draft_needs_its_embedding() -> None:
    draft, embedding = make_draft(), torch.randn(V, H)
    arguments = (draft.state_dict(), a_vocabulary(), "float32", "peagle")
    with pytest.raises(ValueError, match="give its config and the embedding"):
        vllm_tensors(*arguments)
    pushed = vllm_tensors(*arguments, draft.config, embedding)
    assert torch.equal(pushed["embed_tokens.weight"], draft.read_embedding(embedding))


def test_the_command_says_that_the_draft_guesses_in_parallel() -> None:
    said = json.loads(vllm_words("org/t", "d", "bfloat16", 5, "peagle")[-1])
    assert said == {"method": "eagle3", "parallel_drafting": True, "model": "d", "num_speculative_tokens": 5}


def test_fresh_masks_start_from_the_targets_row() -> None:
    draft, embedding = make_draft(), torch.randn(V, H)
    draft.start_from(embedding)
    assert torch.equal(draft.mask_embedding, embedding[MASK])
    assert torch.equal(draft.read_embedding(embedding), embedding)


def test_the_planner_counts_both_vectors() -> None:
    draft = make_draft("norms")
    sizes = PEagleShape.of(draft.config).parameter_sizes
    assert sorted(sizes) == sorted(parameter.numel() for parameter in draft.parameters())


@pytest.mark.parametrize(
    ("changes", "asked", "token", "told"),
    [
        ({"pad_token_id": 5}, None, 5, "mask token 5, the target's pad token"),
        ({"pad_token_id": 5, "eos_token_id": [4, 5]}, None, V - 1, "its pad token 5 begins or ends texts"),
        ({}, None, V - 1, "the last of the target's vocabulary: it has no pad token"),
        ({"pad_token_id": 5}, 7, 7, None),
    ],
)
def test_the_mask_token_is_chosen_by_rule(
    changes: dict[str, Any], asked: int | None, token: int, told: str | None
) -> None:
    section = DraftSection(algorithm="peagle", vocab_size=VD, mask_token_id=asked)
    target = target_config(**changes)
    assert build_draft_config(target, section).mask_token_id == token
    notes = [note for note in draft_notes(target, section) if "mask token" in note]
    assert len(notes) == (told is not None) and (told is None or told in notes[0])


def test_texts_that_hold_the_mask_token_are_told() -> None:
    counts = torch.zeros(V, dtype=torch.int64)
    counts[3] = 7
    algorithm, config = ALGORITHMS["peagle"], make_draft().config
    assert algorithm.warnings_of_text(config, counts) == []
    counts[MASK] = 2
    (warning,) = algorithm.warnings_of_text(config, counts)
    assert f"2 of 9 supervised tokens are the mask token {MASK}" in warning


def test_a_mask_token_beyond_the_vocabulary_is_refused() -> None:
    section = DraftSection(algorithm="peagle", vocab_size=VD, mask_token_id=V)
    with pytest.raises(
        ValueError, match=f"draft.mask_token_id = {V} is not in the target's vocabulary of {V}"
    ):
        build_draft_config(target_config(), section)


@pytest.mark.parametrize(
    ("draft", "loss", "message"),
    [
        ({"mask_token_id": 3}, {}, "mask_token_id is 3 and algorithm is 'eagle3'"),
        ({"algorithm": "peagle", "norm_output": True}, {}, "norm_output is true and algorithm is 'peagle'"),
        ({"algorithm": "peagle"}, {"mask_alignment": "reference"}, "loss.mask_alignment is reference"),
    ],
)
def test_what_the_algorithm_does_not_have_is_refused(
    draft: dict[str, Any], loss: dict[str, Any], message: str
) -> None:
    sections = {
        "target": {"path": "none"},
        "draft": draft,
        "loss": loss,
        "train": {"steps": 1},
        "deepspeed": "none",
        "output_dir": "none",
    }
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(sections)
    del sections["draft" if draft.get("mask_token_id") or draft.get("norm_output") else "loss"]
    Recipe.model_validate(sections)
