"""Decoding during training: which prompts, with which draft, and what is refused; how much memory it is."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.checkpoint.rng import random_states
from eagle3_ds.config import DraftSection, EvalSection, Recipe, load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import decode_alone, speculative_decode
from eagle3_ds.eval.decoded import decoded_rounds
from eagle3_ds.eval.heldout import heldout_prompts, prompts_during
from eagle3_ds.plan import predict_memory
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.targets import Target
from eagle3_ds.train import decoded
from eagle3_ds.train.decoded import DecodedAcceptance
from tests.unit.tiny_families import AUX_LAYERS, family_config, other_config, random_model

ROOT = Path(__file__).parents[2]
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 97, (n,), generator=GENERATOR).tolist() for n in (9, 1, 30)]
SETTINGS = EvalSection(max_new_tokens=10, draft_tokens=4, during=2)


def stand_in(**evaluation: Any) -> Any:
    section = SETTINGS.model_copy(update=evaluation)
    data, draft = SimpleNamespace(seed=5), DraftSection()
    return SimpleNamespace(eval=section, data=data, draft=draft, target=None)


class Tokens:
    eos_token_id = 2


def a_target(family: str = "llama") -> Target:
    config = family_config(family) if family == "llama" else other_config(family)
    return Target(random_model(config), Tokens(), config, AUX_LAYERS)


def a_draft(target: Target, seed: int) -> DraftModel:
    section = DraftSection(vocab_size=64, ttt_steps=4)
    draft = DraftModel(build_draft_config(target.config, section)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return draft.requires_grad_(False)


def said_by(target: Target) -> VocabularyMap:
    """The draft's vocabulary has what the target says."""
    said = [token for prompt in PROMPTS for token in decode_alone(target, prompt, 14, None)]
    return VocabularyMap.from_counts(torch.bincount(torch.tensor(said), minlength=97), 64)


def one_by_one(target: Target, draft: DraftModel, vocabulary: VocabularyMap) -> list[Any]:
    guesser = ALGORITHMS["eagle3"].guesser
    found = []
    for prompt in sorted(PROMPTS, key=len, reverse=True):
        found += speculative_decode(target, guesser(draft, target.embedding, vocabulary), prompt, 10, 4, 2)[1]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_rounds_are_those_of_single_texts(family: str) -> None:
    target = a_target(family)
    draft, vocabulary = a_draft(target, 1), said_by(target)
    found = decoded_rounds(stand_in(), target, draft, None, vocabulary, PROMPTS)
    assert found == one_by_one(target, draft, vocabulary)


class Documents:
    """Held-out conversations, each of a prompt and an answer."""

    def __init__(self, lengths: list[int]) -> None:
        rows = {
            "input_ids": [list(range(length + 3)) for length in lengths],
            "loss_mask": [[0] * length + [1] * 3 for length in lengths],
        }
        self.heldout = Dataset.from_dict(rows)


def test_prompts_are_the_evaluations_own_but_for_long_ones(caplog: pytest.LogCaptureFixture) -> None:
    data: Any = Documents([5, 50, 7, 90, 11, 13, 3000, 17])
    recipe = stand_in(during_prompts=3, during_max_context=60)
    with caplog.at_level(logging.INFO, "eagle3_ds"):
        found = prompts_during(recipe, data, 1000)
    order = heldout_prompts(data, 986, None, 5)  # 1000 positions less 10 new tokens and 4 guesses
    assert found == [prompt for prompt in order if len(prompt) <= 60][:3]
    assert len(order) == 7 and order[:4] == heldout_prompts(data, 986, 4, 5)
    assert "1 of 7 are longer than eval.during_max_context (60) and passed over" in caplog.text
    with pytest.raises(ValueError, match=r"of 7 held-out prompts none .* = 4 tokens \(the shortest has 5\)"):
        prompts_during(stand_in(during_max_context=4), data, 1000)
    with pytest.raises(ValueError, match="of 0 held-out prompts none"):
        prompts_during(recipe, data, 15)


class StandInTrainer:
    """What a decoding asks of a trainer."""

    def __init__(self, target: Target, rank: int) -> None:
        self.draft, self.recipe, self.algorithm = a_draft(target, 1), stand_in(), ALGORITHMS["eagle3"]
        self.vocabulary = said_by(target)
        self.topology = SimpleNamespace(place=SimpleNamespace(rank=rank), device=torch.device("cpu"))
        self.kept: list[bool] = []

    def state_dict(self, keep: bool) -> dict[str, torch.Tensor]:
        self.kept.append(keep)
        return {name: weight.clone() for name, weight in self.draft.state_dict().items()} if keep else {}


def test_rank_0_loads_the_target_once_and_leaves_the_generators_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, loads = a_target(), list[Any]()

    def load(section: Any) -> Target:
        loads.append(section)
        torch.rand(3), random.random()
        return target

    monkeypatch.setattr(decoded, "load_target", load)
    trainer: Any = StandInTrainer(target, 0)
    measured = DecodedAcceptance(trainer, PROMPTS)
    for seed in (1, 2):
        trainer.draft = a_draft(target, seed)
        before = {name: weight.clone() for name, weight in trainer.draft.state_dict().items()}
        rounds = one_by_one(target, trainer.draft, trainer.vocabulary)
        states = random_states(torch.device("cpu"))
        assert measured.measure() == sum(each.emitted for each in rounds) / len(rounds)
        after = random_states(torch.device("cpu"))
        assert all(
            torch.equal(after[name].nan_to_num(), state.nan_to_num()) for name, state in states.items()
        )
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.draft.state_dict().items())
    assert len(loads) == 1 and trainer.kept == [True, True]


def test_another_rank_gathers_and_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = StandInTrainer(a_target(), 1)
    monkeypatch.setattr(decoded, "load_target", None)
    monkeypatch.setattr(decoded, "sum_over_ranks", lambda counts, device: [counts[0] + 30, counts[1] + 20])
    assert DecodedAcceptance(trainer, []).measure() == 1.5
    assert trainer.kept == [False]


@pytest.mark.parametrize(
    ("save_every", "during", "refused"),
    [(4, 2, False), (0, 3, False), (4, 0, True), (4, 3, True), (2, 4, True)],
)
def test_the_best_checkpoint_is_one_that_was_decoded(save_every: int, during: int, refused: bool) -> None:
    given = [f"train.save_every={save_every}", f"eval.during={during}"]
    best = [*given, "train.best_by=acceptance_length_decoded"]
    path = ROOT / "recipes/quickstart.yaml"
    assert load_recipe(path, given).eval.during == during
    if refused:
        with pytest.raises(ValueError, match=rf"save_every is {save_every} and eval.during is {during}"):
            load_recipe(path, best)
    else:
        assert isinstance(load_recipe(path, best), Recipe)


def test_many_prompts_are_refused() -> None:
    for wrong in ({"during_prompts": 65}, {"during_prompts": 0}, {"during_max_context": 0}, {"during": -1}):
        with pytest.raises(ValidationError):
            EvalSection.model_validate(wrong)


def test_the_planner_counts_what_decodes_as_a_phase() -> None:
    path, machines = ROOT / "recipes/llama3.1-8b_128k_usp.yaml", Machines(gpus=8)
    setups = [
        plan_recipe(load_recipe(path, [f"eval.during={n}"]), machines, shape="llama3.1-8b").setup
        for n in (0, 10)
    ]
    without, with_it = (predict_memory(setup) for setup in setups)
    assert "decoding" not in without.phases
    more = {
        key: size for key, size in with_it.phases["decoding"].items() if key not in without.phases["rest"]
    }
    parameters = setups[0].shape.num_parameters
    assert more == {"decoding target": 2 * 8_030_261_248, "decoding draft": 2 * parameters}
    assert with_it.host["decoding target (rank 0)"] == 2 * 8_030_261_248
    assert {name: parts for name, parts in with_it.phases.items() if name != "decoding"} == without.phases
