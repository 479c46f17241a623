"""RolloutTrainer on real ranks: the same step on every mesh, one rank's mistake told to all, weights and
checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle3_ds.config import Recipe, TargetBuild, TargetSection
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_vllm, vllm_tensors
from eagle3_ds.layout import PackedSequence
from eagle3_ds.targets import build_target, capture_hidden_states, load_target, load_tokenizer, teacher_tokens
from eagle3_ds.train.rollout import RolloutTrainer
from eagle3_ds.train.rollout_inputs import Rollout
from eagle3_ds.train.spans import plan_spans
from judge.family_configs import tiny_config
from tests.unit.tiny_families import random_model

pytestmark = pytest.mark.ranks
TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * 4 for n in range(30)]
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_layers": 7, "max_positions": 256}
LENGTHS = ((40, 25), (33, 30, 7))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target") / "tiny"
    build = TargetBuild.model_validate({**SIZES, "sequence_length": 32, "batch_size": 4, "steps": 0})
    build_target(TargetSection(path=str(path), build=build), TEXTS, progress=False)
    return str(path)


def make_recipe(target: str, output: Path, draft_dp: int, ulysses: int, stage: int) -> Recipe:
    return Recipe.model_validate(
        {
            "target": {"path": target, "dtype": "float32"},
            "draft": {"vocab_size": 320, "ttt_steps": 3},
            "parallel": {"draft_dp": draft_dp, "ulysses": ulysses},
            "train": {"steps": 1, "dtype": "float32", "learning_rate": 1e-2, "accumulation": 2 // draft_dp},
            "deepspeed": str(Path(__file__).parents[2] / "ds_configs" / f"zero{stage}.json"),
            "output_dir": str(output),
        }
    )


def make_rollouts(target: str) -> list[Rollout]:
    """Two packed sequences, their hidden states from the target."""
    model = load_target(TargetSection(path=target), dtype="float32")
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for lengths in LENGTHS:
        documents = [torch.randint(0, 300, (length,), generator=generator) for length in lengths]
        states = [capture_hidden_states(model, document) for document in documents]
        mask = torch.rand(sum(lengths), generator=generator) < 0.7
        aux, teacher = (torch.cat(column) for column in zip(*states, strict=True))
        rollouts.append(Rollout(torch.cat(documents), mask, lengths, aux, teacher))
    return rollouts


def train(target: str, output: Path, draft_dp: int, ulysses: int, stage: int) -> dict[str, object]:
    """Two steps, a checkpoint, and a third step that is repeated from it."""
    trainer = RolloutTrainer(make_recipe(target, output, draft_dp, ulysses, stage))
    rollouts = make_rollouts(target)
    place = trainer.trainer.topology.place
    own = rollouts if draft_dp == 1 else [rollouts[place.dp_rank]]
    before = trainer.evaluate(own)
    losses = [trainer.step(own).loss for _ in range(2)]
    checkpoint = trainer.save(output / "checkpoints")
    losses.append(trainer.step(own).loss)
    weights = trainer.state_dict()
    steps = trainer.load(checkpoint)
    again = trainer.step(own).loss
    return {"before": before.loss, "losses": losses, "again": again, "steps": steps, "weights": weights}


MESHES = [(1, 1, 2), (1, 2, 2), (2, 1, 3)]


@pytest.fixture(scope="module")
def results(run_ranks, target: str, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("runs")
    return {mesh: run_ranks(mesh[0] * mesh[1], train, target, output / str(mesh), *mesh) for mesh in MESHES}


def test_the_step_is_the_same_on_every_mesh(results) -> None:
    reference = results[MESHES[0]][0]
    assert reference["losses"] == sorted(reference["losses"], reverse=True)
    for mesh in MESHES:
        for rank in results[mesh]:
            assert rank["before"] == pytest.approx(reference["before"], rel=1e-5)
            assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-5)
            for name, weight in rank["weights"].items():
                torch.testing.assert_close(weight, reference["weights"][name], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_goes_on_where_it_was(results) -> None:
    for ranks in results.values():
        for rank in ranks:
            assert rank["steps"] == 2
            assert rank["again"] == pytest.approx(rank["losses"][2], rel=1e-6)


def test_the_weights_have_the_names_that_servers_load(results) -> None:
    vocabulary = VocabularyMap.from_counts(torch.zeros(320, dtype=torch.int64), 320)
    tensors = vllm_tensors(results[MESHES[0]][0]["weights"], vocabulary)
    wanted = {"midlayer.self_attn.q_proj.weight", "fc.weight", "lm_head.weight", "norm.weight"}
    assert wanted <= tensors.keys()
    # The draft guesses every token of the target: vLLM refuses a map then.
    assert not {"d2t", "t2d"} & tensors.keys()


def captured(target: str, output: Path) -> tuple[PackedSequence, PackedSequence, np.ndarray]:
    """The pack of a rollout without and with the teacher's tokens, as capture finds them; and the slots that
    are read.
    """
    trainer = RolloutTrainer(make_recipe(target, output, 1, 1, 2))
    rollout = make_rollouts(target)[0]
    head = load_target(TargetSection(path=target), dtype="float32").head
    given = replace(rollout, teacher_token=teacher_tokens(rollout.teacher[:], head))
    plan = plan_spans(trainer.recipe, rollout.lengths, rollout.loss_mask)
    return (
        trainer._packer.pack(rollout),
        trainer._packer.pack(given),
        plan.teacher_slots(0, 0, trainer.recipe.draft.ttt_steps),
    )


def test_the_teachers_tokens_are_found_when_they_are_not_given(
    run_ranks, target: str, tmp_path: Path
) -> None:
    ((found, given, read),) = run_ranks(1, captured, target, tmp_path)
    assert len(read) > 0.9 * len(given.teacher_token)
    assert (
        torch.equal(found.teacher_token[read], given.teacher_token[read])
        and len(given.teacher_token.unique()) > 5
    )


def one_bad_rank(target: str, output: Path) -> tuple[str, float]:
    """The message each of two draft_dp ranks gets when rank 1's rollout has a NaN, and the loss of the next,
    good step.
    """
    trainer = RolloutTrainer(make_recipe(target, output, 2, 1, 2))
    rank = trainer.trainer.topology.place.dp_rank
    good = make_rollouts(target)[rank]
    aux = good.aux[:].clone()
    aux[11, 3] = float("nan")
    try:
        trainer.step(good if rank == 0 else replace(good, aux=aux))
    except ValueError as error:
        return str(error), trainer.step(good).loss
    raise AssertionError("the step was taken")


def nothing_to_learn(target: str, output: Path) -> tuple[str, str, int]:
    """What two draft_dp ranks are told of a step, and of an evaluation, when rank 1's rollout marks no token;
    and the steps that were taken.
    """
    trainer = RolloutTrainer(make_recipe(target, output, 2, 1, 2))
    rank = trainer.trainer.topology.place.dp_rank
    good = make_rollouts(target)[rank]
    given = good if rank == 0 else replace(good, loss_mask=torch.zeros_like(good.loss_mask))
    with pytest.raises(ValueError) as step:
        trainer.step(given)
    with pytest.raises(ValueError) as evaluation:
        trainer.evaluate([given])
    return str(step.value), str(evaluation.value), trainer.steps


def test_a_rollout_without_a_token_is_an_error_on_all(run_ranks, target: str, tmp_path: Path) -> None:
    other, own = run_ranks(2, nothing_to_learn, target, tmp_path)
    assert all("1 other rank(s) refused their rollouts" in words for words in other[:2])
    assert all("loss_mask marks 0 of 70 rows, and none" in words for words in own[:2])
    assert other[2] == own[2] == 0


def test_a_mistake_on_one_rank_is_an_error_on_all(run_ranks, target: str, tmp_path: Path) -> None:
    (other, first), (own, second) = run_ranks(2, one_bad_rank, target, tmp_path)
    assert "1 other rank(s) refused their rollouts and say why: no rank takes this step" in other
    assert "aux is not finite at row 11" in own
    assert first == second and math.isfinite(first)


def new_policy(target: str, output: Path) -> tuple[float, float, float, str]:
    """Loss of a draft: with the target it was trained for, with another embedding and head, and of a trainer
    that began with these; and what is said to an embedding of another size."""
    recipe = make_recipe(target, output, 1, 1, 2)
    model = load_target(TargetSection(path=target), dtype="float32")
    rollouts = make_rollouts(target)
    trainer = RolloutTrainer(recipe)
    for _ in range(5):
        trainer.step(rollouts)
    losses = [trainer.evaluate(rollouts).loss]
    embedding, head = model.embedding.flip(0) * 50, model.head * 50
    trainer.update_target(model.embedding, head)
    only_head = trainer.evaluate(rollouts).loss
    trainer.update_target(embedding, head)
    losses.append(trainer.evaluate(rollouts).loss)
    assert abs(losses[-1] - only_head) > 1e-3 and abs(only_head - losses[0]) > 1e-3
    model.model.get_input_embeddings().weight.data.copy_(embedding)
    model.model.get_output_embeddings().weight.data.copy_(head)
    model.model.save_pretrained(output / "moved")
    moved = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"path": str(output / "moved")})}
    )
    losses.append(RolloutTrainer(moved, weights=trainer.state_dict()).evaluate(rollouts).loss)
    try:
        trainer.update_target(embedding[1:], head)
    except ValueError as error:
        return losses[0], losses[1], losses[2], str(error)
    raise AssertionError("a smaller embedding was taken")


def test_a_target_that_was_trained_meanwhile_is_taken_over(run_ranks, target: str, tmp_path: Path) -> None:
    ((before, after, fresh, message),) = run_ranks(1, new_policy, target, tmp_path)
    assert after == pytest.approx(fresh, rel=1e-6) and abs(after - before) > 1e-3
    assert "embedding has shape (319, 32), the target's is (320, 32)" in message


def scaled_policy(target: str, output: Path) -> tuple[float, float, float, float]:
    """Losses with a target whose logits are a fraction of head x hidden state: as its files give it, after
    the same embedding and head came from the loop, after a head fifty times its size, and of a trainer that
    began with that head.
    """
    recipe, rollouts = make_recipe(target, output, 1, 1, 2), make_rollouts(target)
    trainer = RolloutTrainer(recipe)
    policy = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    embedding, head = (policy.get_input_embeddings().weight.data, policy.get_output_embeddings().weight.data)
    losses = [trainer.evaluate(rollouts).loss]
    for factor in (1.0, 50.0):
        trainer.update_target(embedding, factor * head)
        losses.append(trainer.evaluate(rollouts).loss)
    head *= 50
    policy.save_pretrained(output / "moved")
    load_tokenizer(recipe.target).save_pretrained(output / "moved")
    moved = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"path": str(output / "moved")})}
    )
    fresh = RolloutTrainer(moved, weights=trainer.state_dict()).evaluate(rollouts).loss
    return losses[0], losses[1], losses[2], fresh


def test_the_head_of_a_policy_is_scaled_as_that_of_its_files(run_ranks, target: str, tmp_path: Path) -> None:
    changes = {"vocab_size": 320, "num_hidden_layers": 7, "logits_scaling": 4.0}
    random_model(tiny_config("granite", **changes)).save_pretrained(tmp_path / "granite")
    load_tokenizer(TargetSection(path=target)).save_pretrained(tmp_path / "granite")
    ((before, same, other, fresh),) = run_ranks(1, scaled_policy, str(tmp_path / "granite"), tmp_path)
    assert same == before
    assert other == pytest.approx(fresh, rel=1e-6) and abs(other - before) > 1e-3


def no_vocabulary(target: str, output: Path) -> str:
    recipe = make_recipe(target, output, 1, 1, 2)
    smaller = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"vocab_size": 100})})
    try:
        RolloutTrainer(smaller)
    except ValueError as error:
        return str(error)
    raise AssertionError("a vocabulary was made up")


def sampled_anchors(target: str, output: Path) -> str:
    recipe = make_recipe(target, output, 1, 1, 2).model_dump()
    recipe["draft"] = {"algorithm": "dflash", "vocab_size": 320, "anchor_share": 0.5}
    with pytest.raises(ValueError) as refused:
        RolloutTrainer(Recipe.model_validate(recipe))
    return str(refused.value)


def test_anchors_are_not_drawn_from_what_is_seen_once(run_ranks, target: str, tmp_path: Path) -> None:
    (message,) = run_ranks(1, sampled_anchors, target, tmp_path)
    assert "draft.anchor_share is 0.5" in message and "Set it to 1" in message


def test_a_draft_vocabulary_is_not_made_up(run_ranks, target: str, tmp_path: Path) -> None:
    (message,) = run_ranks(1, no_vocabulary, target, tmp_path)
    assert (
        "draft.vocab_size is 100 of the target's 320 tokens" in message
        and "vocabulary.safetensors" in message
    )


def from_an_export(target: str, output: Path) -> tuple[float, float, float, int]:
    """Loss of a trained draft, of one that a recipe takes over from its export, and of a new one; and the
    size of the vocabulary, which comes with the export.
    """
    recipe, rollouts = make_recipe(target, output, 1, 1, 2), make_rollouts(target)
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"vocab_size": 100})})
    counts = torch.bincount(torch.cat([rollout.token_ids for rollout in rollouts]), minlength=320)
    trainer = RolloutTrainer(recipe, vocabulary=counts)
    fresh = trainer.evaluate(rollouts).loss
    for _ in range(3):
        trainer.step(rollouts)
    config = trainer.trainer.draft.config
    folder = export_vllm(trainer.state_dict(), config, trainer.vocabulary, output / "draft", "float32")
    train = recipe.train.model_copy(update={"init_from": str(folder)})
    again = RolloutTrainer(recipe.model_copy(update={"train": train}))
    found = again.evaluate(rollouts).loss
    return trainer.evaluate(rollouts).loss, found, fresh, len(again.vocabulary.d2t)


def test_a_recipe_may_name_the_draft_to_begin_with(run_ranks, target: str, tmp_path: Path) -> None:
    ((trained, found, fresh, size),) = run_ranks(1, from_an_export, target, tmp_path)
    assert found == trained < fresh and size == 100
