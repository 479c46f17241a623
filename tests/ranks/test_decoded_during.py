"""Held-out prompts that are decoded during training, on ranks: with the draft as it is, without a trace in
the run, and the same after it was resumed.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import CHECKPOINTS, FINAL_WEIGHTS, folder_name, read_manifest, step_folders
from eagle3_ds.config import EvalSection, Recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import speculative_decode
from eagle3_ds.eval.heldout import prompts_during
from eagle3_ds.run.stages import prepare
from eagle3_ds.targets import load_target
from judge.resume_runs import (
    SHAPES,
    STEPS,
    Blow,
    differences,
    make_recipe,
    read_metrics,
    run,
    run_struck,
    start_output,
)

pytestmark = pytest.mark.ranks
SHAPE, WORLD = "zero3", SHAPES["zero3"].world_size
SETTINGS = EvalSection(
    num_prompts=0, max_new_tokens=24, draft_tokens=3, during=2, during_prompts=3, during_max_context=40
)


def decoding(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"eval": SETTINGS})


@pytest.fixture(scope="module")
def runs(resume_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run without and with decoding."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("without", "with"):
        start_output(resume_inputs, root / name)
        recipe = make_recipe(resume_inputs, SHAPE, root / name, learning_rate=3e-2)
        run(decoding(recipe) if name == "with" else recipe, WORLD)
    return root / "without", root / "with"


def lengths(output: Path) -> list[float | None]:
    return [record.get("acceptance_length_decoded") for record in read_metrics(output)]


def test_decoding_leaves_no_trace(runs: tuple[Path, Path]) -> None:
    """Losses, weights, moments and random states are those of the run without."""
    assert WORLD == 2
    assert differences(runs[1], runs[0]) == []
    for rank in range(WORLD):
        name = f"{CHECKPOINTS}/{folder_name(STEPS)}/rank-{rank:05}.safetensors"
        found, expected = (load_file(output / name) for output in reversed(runs))
        assert found.keys() == expected.keys() and any(key.startswith("rng/") for key in found)
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        # Nobody seeds Python's own generator: no two runs agree in it.
        assert [key for key in different if not key.startswith("rng/python")] == []
    assert lengths(runs[0]) == [None] * STEPS


def test_what_is_decoded_is_the_draft_of_that_step(resume_inputs: Path, runs: tuple[Path, Path]) -> None:
    """The last figure is that of the final weights, decoded here one by one."""
    recipe = decoding(make_recipe(resume_inputs, SHAPE, runs[1]))
    prepared = json.loads((runs[1] / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    target, algorithm = load_target(recipe.target), algorithm_of(recipe)
    prompts = prompts_during(recipe, data, target.config.max_position_embeddings)
    assert len(prompts) == 3
    vocabulary = VocabularyMap.load(runs[1] / "vocabulary.safetensors")
    eos = target.tokenizer.eos_token_id

    def acceptance(weights: dict[str, torch.Tensor]) -> float:
        draft = algorithm.build(algorithm.build_config(target.config, recipe)).eval()
        draft.load_state_dict(weights)
        rounds = []
        for prompt in prompts:
            guesser = algorithm.guesser(draft, target.embedding, vocabulary)
            rounds += speculative_decode(target, guesser, prompt, 24, 3, eos)[1]
        return sum(each.emitted for each in rounds) / len(rounds)

    first, _, third, last = lengths(runs[1])
    assert (first, third) == (None, None)
    final = load_file(runs[1] / FINAL_WEIGHTS)
    assert last == acceptance(final) > 1.0
    assert acceptance({name: torch.randn_like(weight) for name, weight in final.items()}) != last


def test_a_resumed_run_decodes_the_same_and_keeps_the_best(
    resume_inputs: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    start_output(resume_inputs, output)
    recipe = decoding(
        make_recipe(resume_inputs, SHAPE, output, learning_rate=3e-2, save_every=2, keep_checkpoints=1)
    )
    by_decoded = recipe.train.model_copy(update={"best_by": "acceptance_length_decoded"})
    recipe = recipe.model_copy(update={"train": by_decoded})
    run_struck(recipe, WORLD, Blow(step=2, moment=0.0, rank=1, number=signal.SIGTERM))
    assert len(read_metrics(output)) == 3
    run(recipe, WORLD)
    assert differences(output, runs[0]) == []
    assert lengths(output) == lengths(runs[1])
    decoded = {
        folder.name: read_manifest(folder).heldout_decoded for folder in step_folders(output / CHECKPOINTS)
    }
    found = {folder_name(step): length for step, length in enumerate(lengths(output), 1) if length}
    best = max(found, key=lambda name: (found[name], name == folder_name(STEPS)))
    assert set(decoded) == {best, folder_name(STEPS)}
    assert all(decoded[name] == found[name] for name in decoded)


def test_prompts_that_are_all_too_long_are_told_before_a_rank_starts(
    resume_inputs: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(resume_inputs, SHAPE, tmp_path / "run")
    few = SETTINGS.model_copy(update={"during_max_context": 2})
    with pytest.raises(ValueError, match=r"none has at most eval.during_max_context = 2 tokens"):
        prepare(recipe.model_copy(update={"eval": few}))
