"""What a rollout is refused for, on the rank that reads it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.train.rollout import RolloutTrainer
from eagle3_ds.train.rollout_inputs import (
    Rollout,
    check_supervised,
    check_tokens,
    checked_rows,
    draft_vocabulary,
)

LENGTHS, VOCABULARY, HIDDEN = (5, 9), 50, 4
RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
SUPERVISION = algorithm_of(RECIPE).supervision(RECIPE)


def rollout(**changes):
    length = sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    honest = Rollout(
        token_ids=torch.randint(0, VOCABULARY, (length,), generator=generator),
        loss_mask=torch.arange(length) % 2 == 1,
        lengths=LENGTHS,
        aux=torch.randn(length, 3 * HIDDEN, generator=generator),
        teacher=torch.randn(length, HIDDEN, generator=generator),
        teacher_token=torch.zeros(length, dtype=torch.int64),
    )
    return replace(honest, **changes)


def test_a_rollout_in_order_passes():
    assert check_tokens(rollout(), VOCABULARY) == 14
    assert (
        check_tokens(rollout(teacher_token=None, loss_mask=torch.ones(14, dtype=torch.int8)), VOCABULARY)
        == 14
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (5, 8)}, r"lengths is [5, 8] with the sum 13, and token_ids has 14 tokens"),
        ({"lengths": ()}, "lengths is [] with the sum 0"),
        ({"lengths": (14, 0)}, "each at least 1"),
        (
            {"token_ids": torch.full((14,), VOCABULARY)},
            "token_ids holds 50 at row 0, expected a token of the target, below 50",
        ),
        ({"token_ids": torch.tensor([*range(13), -1])}, "token_ids holds -1 at row 13"),
        ({"token_ids": torch.zeros(14)}, "token_ids is torch.float32 (14,), expected integers"),
        (
            {"loss_mask": torch.ones(13, dtype=torch.bool)},
            "loss_mask is torch.bool (13,), expected integers or booleans (14,)",
        ),
        ({"loss_mask": torch.full((14,), 2)}, "loss_mask holds 2 at row 0, expected 0 or 1"),
        ({"teacher_token": torch.full((14,), 99)}, "teacher_token holds 99 at row 0"),
        ({"teacher_token": torch.zeros(14, 1, dtype=torch.int64)}, "teacher_token is torch.int64 (14, 1)"),
    ],
)
def test_tokens_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_tokens(rollout(**changes), VOCABULARY)


@pytest.mark.parametrize(
    "marked",
    [[], [0], [5], [0, 5]],
    ids=["nothing", "a first token", "of the second document", "of both documents"],
)
def test_a_rollout_from_which_nothing_is_learnt_is_refused(marked):
    mask = torch.zeros(14, dtype=torch.bool)
    mask[marked] = True
    with pytest.raises(ValueError, match=f"loss_mask marks {len(marked)} of 14 rows, and none"):
        check_supervised(LENGTHS, mask, SUPERVISION)
    mask[1] = True
    check_supervised(LENGTHS, mask, SUPERVISION)


def read(rows, slots=range(14)):
    return list(checked_rows("teacher", rows, np.array(slots), 14, HIDDEN))


class Lazy:
    """Rows that are no tensor, and remember what was asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __getitem__(self, rows):
        self.asked.append(rows)
        return self.rows[rows]


def test_only_a_ranks_own_rows_are_read_and_checked():
    teacher = rollout().teacher.clone()
    teacher[3] = float("nan")
    rows = Lazy(teacher)
    ((slots, piece),) = read(rows, [0, 1, 5, 6, 7, 20])
    assert slots.tolist() == [0, 1, 5, 6, 7] and torch.equal(piece, teacher[slots])
    assert rows.asked == [slice(0, 2), slice(5, 8)]
    with pytest.raises(ValueError, match="teacher is not finite at row 3: leave that document out"):
        read(rows, [1, 2, 3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(14, 5), "teacher has shape (14, 5), expected (14, 4)"),
        (torch.zeros(13, 4), "teacher has shape (13, 4), expected (14, 4)"),
        (torch.zeros(14, 4, dtype=torch.int64), "teacher gives torch.int64 (14, 4), expected floating point"),
        (Lazy(torch.zeros(14, 5)), "teacher gives torch.float32 (14, 5), expected floating point (14, 4)"),
        (Lazy(torch.zeros(9, 4)), "teacher gives torch.float32 (9, 4)"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(rows)


def recipe_of(size, folder):
    draft = RECIPE.draft.model_copy(update={"vocab_size": size})
    return RECIPE.model_copy(update={"draft": draft, "output_dir": str(folder)})


def test_the_vocabulary_comes_from_counts_from_a_file_or_from_the_output_folder(tmp_path):
    counts = torch.tensor([5, 0, 7, 1, 0, 9])
    recipe = recipe_of(3, tmp_path)
    wanted = VocabularyMap.from_counts(counts, 3)
    assert wanted.draft_to_target.tolist() == [0, 2, 5]
    assert draft_vocabulary(recipe, counts, 6).equals(wanted) and draft_vocabulary(recipe, wanted, 6).equals(
        wanted
    )
    wanted.save(tmp_path / "counted.safetensors")
    assert draft_vocabulary(recipe, tmp_path / "counted.safetensors", 6).equals(wanted)
    with pytest.raises(ValueError, match=r"draft.vocab_size is 3 of the target's 6 tokens, and .* which"):
        draft_vocabulary(recipe, None, 6)
    wanted.save(tmp_path / "vocabulary.safetensors")
    assert draft_vocabulary(recipe, None, 6).equals(wanted)
    assert len(draft_vocabulary(recipe_of(6, tmp_path / "empty"), None, 6).d2t) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.ones(5, dtype=torch.int64),
            r"is torch.int64 \(5,\), expected counts, int64 \(6,\)",
        ),
        (torch.ones(6), "vocabulary is torch.float32"),
        (-torch.ones(6, dtype=torch.int64), "none below 0"),
        ("nowhere.safetensors", "vocabulary is 'nowhere.safetensors', which is no file"),
        (
            VocabularyMap.from_counts(torch.ones(6, dtype=torch.int64), 4),
            "has 4 of 6 tokens, and the recipe",
        ),
        (VocabularyMap.from_counts(torch.ones(9, dtype=torch.int64), 3), "has 3 of 9 tokens"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        draft_vocabulary(recipe_of(3, tmp_path), given, 6)


def test_drawn_anchors_are_refused() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart_dflash.yaml"
    with pytest.raises(ValueError, match=r"draft\.anchor_share is 0\.5: .*rollouts have neither.* to 1\.0"):
        RolloutTrainer(recipe, ["draft.anchor_share=0.5"])


def test_a_look_up_start_is_refused() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    with pytest.raises(ValueError, match=r"draft\.start is 'lookup'.*rollouts come later.*Set it to random"):
        RolloutTrainer(recipe, ["draft.start=lookup"])
