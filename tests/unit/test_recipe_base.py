"""Recipes that stand on a base: what is taken over, from which file, and how a mistake in one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.config import dump_recipe, load_deepspeed_config, load_recipe
from eagle3_ds.config.load import read_recipe, recipe_differences

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILY = """
target: {path: some/target, build: {num_layers: 9, steps: 50}}
draft: {vocab_size: 300, num_layers: 2}
data: {train: [a.jsonl, b.jsonl], max_length: 2048, chat_template_arguments: {a: 1, b: 2}}
train: {steps: 10, warmup_steps: 3}
deepspeed: zero2
"""


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_own_keys_come_before_those_of_the_base_and_overrides_before_both(tmp_path: Path) -> None:
    own = """
base: middle.yaml
data: {train: [c.jsonl], chat_template_arguments: {b: 3}}
train: {warmup_steps: 5}
"""
    middle = "base: family.yaml\ntarget: {build: {steps: 60}}\ntrain: {warmup_steps: 4, seed: 7}\n"
    write(tmp_path, family=FAMILY, middle=middle, own=own)
    recipe = load_recipe(tmp_path / "own.yaml", ["train.seed=8", "draft.num_layers=3"])
    assert recipe.target.build is not None
    assert (recipe.target.build.num_layers, recipe.target.build.steps) == (9, 60)
    assert recipe.data.train == ("c.jsonl",), "a list replaces"
    assert (recipe.data.max_length, recipe.data.chat_template_arguments) == (2048, {"a": 1, "b": 3})
    assert (recipe.train.steps, recipe.train.warmup_steps, recipe.train.seed) == (10, 5, 8)
    assert (recipe.draft.vocab_size, recipe.draft.num_layers) == (300, 3)


def test_null_takes_a_section_or_a_value_away(tmp_path: Path) -> None:
    own = "base: family.yaml\ntarget: {build: null}\ntrain: {steps: null, epochs: 2}\n"
    write(tmp_path, family=FAMILY, own=own)
    recipe = load_recipe(tmp_path / "own.yaml")
    assert recipe.target.build is None
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.warmup_steps) == (None, 2, 3)
    write(tmp_path, own="base: family.yaml\ndeepspeed: {zero_optimization: {stage: 1}}\n")
    assert load_recipe(tmp_path / "own.yaml").deepspeed == {"zero_optimization": {"stage": 1}}


def test_the_recipe_as_it_ran_needs_no_base(tmp_path: Path) -> None:
    write(tmp_path, family=FAMILY, own="base: family.yaml\n")
    recipe = load_recipe(tmp_path / "own.yaml")
    (tmp_path / "family.yaml").unlink()
    write(tmp_path, resolved=dump_recipe(recipe))
    assert read_recipe(tmp_path / "resolved.yaml") == (recipe, ())


def test_a_base_is_found_beside_the_recipe_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path, family=FAMILY)
    write(tmp_path / "mine", own="base: ../family.yaml\n")
    write(tmp_path / "here", family="{}")
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe("../mine/own.yaml").target.path == "some/target"
    assert load_recipe(tmp_path / "mine" / "own.yaml").target.path == "some/target"
    write(tmp_path / "mine", own=f"base: {tmp_path / 'family.yaml'}\n")
    assert load_recipe("../mine/own.yaml").target.path == "some/target"


@pytest.mark.parametrize("ending", ["", ".yaml"])
def test_a_shipped_recipe_is_a_base_by_its_name_and_a_file_comes_first(tmp_path: Path, ending: str) -> None:
    shipped, own = RECIPES / "quickstart_peagle.yaml", tmp_path / "own.yaml"
    own.write_text(f"base: quickstart_peagle{ending}\ntrain: {{steps: 20}}\n")
    recipe, told = read_recipe(own)
    assert told[0] == (
        f"{own}: its base quickstart_peagle{ending} is no file beside it; taken: the shipped {shipped}"
    )
    assert recipe_differences(load_recipe(shipped), recipe) == [
        "train.steps: 300 -> 20",
        "output_dir: 'output/quickstart_peagle' -> 'output/own'",
    ]
    (tmp_path / f"quickstart_peagle{ending}").write_text(FAMILY)
    recipe, told = read_recipe(own)
    assert recipe.target.path == "some/target" and "taken: the shipped" not in " ".join(told)


def test_a_deepspeed_json_is_looked_for_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bases", "mine/deep", "here"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "bases", family=FAMILY.replace("zero2", "one.json"))
    own = tmp_path / "mine/deep/own.yaml"
    own.write_text("base: ../../bases/family.yaml\n")
    (own.parent / "one.json").write_text("{}")
    assert load_recipe(own).deepspeed == "one.json", "not the one beside the recipe, which does not name it"
    (tmp_path / "bases" / "one.json").write_text('{"zero_optimization": {"stage": 1}}')
    found = load_recipe(own).deepspeed
    assert load_deepspeed_config(found) == {"zero_optimization": {"stage": 1}}
    assert load_recipe(own, ["deepspeed=one.json"]).deepspeed == str(own.parent / "one.json")


def test_the_output_folder_has_the_recipes_own_name_unless_a_base_names_one(tmp_path: Path) -> None:
    write(tmp_path, family=FAMILY, own="base: family.yaml\n")
    assert load_recipe(tmp_path / "own.yaml").output_dir == "output/own"
    write(tmp_path, family=FAMILY + "output_dir: output/ours\n")
    assert load_recipe(tmp_path / "own.yaml").output_dir == "output/ours"


def test_a_circle_is_refused_with_its_files(tmp_path: Path) -> None:
    write(tmp_path, start="base: a.yaml\n", a="base: b.yaml\n", b="base: ./a.yaml\n", c="base: c.yaml\n")
    start, a, b, c = (tmp_path / f"{name}.yaml" for name in ("start", "a", "b", "c"))
    assert f"{start}: the bases form a circle: {a} -> {b} -> {a}. Remove" in refusal(start)
    assert f"the bases form a circle: {c} -> {c}. " in refusal(c)
    (tmp_path / "link.yaml").symlink_to(c)
    write(tmp_path, c="base: link.yaml\n")
    assert f"the bases form a circle: {c} -> {tmp_path / 'link.yaml'}. " in refusal(c)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("3", "base: the value is 3, but it should be the path of a recipe"),
        ("", "base: the value is null, but it should be"),
        ("''", 'base: the value is "", but it should be'),
        ("[family.yaml]", 'base: the value is ["family.yaml"], but it should be'),
        ("famly.yaml", "famly.yaml is not a file, and no recipe of that name is shipped"),
        ("quikstart", "shipped name: quickstart, quickstart_"),
        (".", "is not a file"),
        ("x" * 5000, "is not a file"),
        ('"a\\0b"', "is not a file"),
    ],
)
def test_what_is_no_base_is_refused(tmp_path: Path, base: str, words: str) -> None:
    write(tmp_path, family=FAMILY, own=f"base: {base}\n")
    message = refusal(tmp_path / "own.yaml")
    assert message.startswith(f"{tmp_path / 'own.yaml'}: base: ") and words in message


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    write(tmp_path, own="base: family.yaml\n")
    for text, words in (("[1]", "a recipe is a mapping of sections, not list"), ("a: [", "not valid YAML")):
        write(tmp_path, family=text)
        assert refusal(tmp_path / "own.yaml").startswith(f"{tmp_path / 'family.yaml'}: {words}")
    write(tmp_path, family="data: &d {train: *d}\n")
    assert f"{tmp_path / 'family.yaml'}: nested far deeper than any recipe" in refusal(tmp_path / "own.yaml")


def test_a_base_is_named_in_a_file_alone(tmp_path: Path) -> None:
    write(tmp_path, family=FAMILY, own="base: family.yaml\n")
    assert "Write `base` into the recipe" in refusal(tmp_path / "own.yaml", "base=quickstart")
    write(tmp_path, own="bases: family.yaml\n")
    assert "bases: unknown key. Did you mean `base`?" in refusal(tmp_path / "own.yaml")
    write(tmp_path, own="base: family.yaml\ntrain: {base: family.yaml}\n")
    assert "train.base: unknown key" in refusal(tmp_path / "own.yaml")


def test_a_mistake_is_told_with_the_file_in_which_it_stands(tmp_path: Path) -> None:
    family = FAMILY.replace("num_layers: 2", "num_layers: two, ttt_step: 3").replace("a.jsonl", "1")
    write(tmp_path, family=family, own="base: family.yaml\nparallel: {ring: 0}\n")
    own, base = tmp_path / "own.yaml", tmp_path / "family.yaml"
    lines = refusal(own).splitlines()
    assert lines[0] == f"{own}: 4 problems in the recipe:"
    ends = {line.strip().partition(":")[0]: line.endswith(f" It stands in {base}.") for line in lines[1:]}
    assert ends == {
        "draft.num_layers": True,
        "draft.ttt_step": True,
        "data.train.0": True,
        "parallel.ring": False,
    }
    assert "draft.num_layers" not in refusal(own, "draft.num_layers=2")
    assert f"{base}" not in refusal(own, "draft={vocab_size: many}", "data.train=[]")
    # The recipe's own value is what counts, and what is told.
    write(tmp_path, family=FAMILY, own="base: family.yaml\ndraft: {num_layers: three}\n")
    assert str(base) not in refusal(own)


def test_keys_that_do_not_go_together_are_told_with_both_files(tmp_path: Path) -> None:
    family = FAMILY.replace("num_layers: 2", "ttt_steps: 7")
    write(tmp_path, family=family, own="base: family.yaml\ndraft: {algorithm: dflash}\n")
    own, base = tmp_path / "own.yaml", tmp_path / "family.yaml"
    message = refusal(own)
    assert "draft: ttt_steps is 7 and algorithm is 'dflash'" in message
    assert message.endswith(f"The keys of draft stand in {own} and {base}.")
    write(tmp_path, own="base: family.yaml\nloss: {mask_alignment: predicted}\n")
    message = refusal(own)
    assert "recipe: loss.mask_alignment is predicted and draft.algorithm is eagle3" in message
    assert message.endswith(f"The keys of the recipe stand in {own} and {base}.")


def test_the_command_line_refuses_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, a="base: b.yaml\n", b="base: a.yaml\n")
    assert main(["launch", str(tmp_path / "a.yaml"), "--dry-run"]) == 2
    assert "the bases form a circle" in capsys.readouterr().err


# The shipped recipes: what each has of its own

SHIPPED = {
    "llama3.1-8b_128k_peagle": ("llama3.1-8b_128k_usp", {"draft.algorithm: 'eagle3' -> 'peagle'"}),
    "llama3.1-8b_8k_zero2": (
        "llama3.1-8b_128k_usp",
        {
            "data.max_length: 131072 -> 8192",
            "parallel.ulysses: 4 -> 1",
            "parallel.ring: 2 -> 1",
            "parallel.draft_dp: 1 -> 8",
            "train.accumulation: 4 -> 2",
        },
    ),
    "qwen3-8b_128k_dflash": (
        "qwen3-8b_128k_usp",
        {
            "target.aux_layers: None -> [2, 10, 18, 26, 34]",
            "draft.algorithm: 'eagle3' -> 'dflash'",
            "draft.block_size: None -> 16",
            "draft.num_layers: 1 -> 5",
            "draft.anchor_share: None -> 0.25",
            "eval.draft_tokens: 7 -> 15",
        },
    ),
    "qwen3-32b_128k_2nodes": (
        "qwen3-8b_128k_usp",
        {
            "target.path: 'Qwen/Qwen3-8B' -> 'Qwen/Qwen3-32B'",
            "parallel.ring: 1 -> 2",
            "deepspeed: 'zero2' -> 'zero3'",
        },
    ),
    "quickstart_peagle": ("quickstart", {"draft.algorithm: 'eagle3' -> 'peagle'"}),
    "quickstart_dflash": (
        "quickstart",
        {
            "draft.algorithm: 'eagle3' -> 'dflash'",
            "draft.block_size: None -> 8",
            "draft.num_layers: 1 -> 2",
            "draft.anchor_share: None -> 1.0",
        },
    ),
}
OF_THE_ALGORITHM = {  # keys that one algorithm has and the other has not, at their defaults
    "draft.ttt_steps: 7 -> None",
    "draft.start: 'random' -> None",
    *(f"draft.{key}: False -> None" for key in ("aux_norm", "norm_before_fc", "norm_before_residual")),
    "draft.norm_output: False -> None",
    "draft.mask_token_id: None -> None",
    "draft.mask_embedding: None -> False",
    "draft.block_causal: None -> False",
}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_differs_from_its_base_in_so_much(name: str) -> None:
    base, own = SHIPPED[name]
    recipes = [load_recipe(RECIPES / f"{file}.yaml") for file in (base, name)]
    differences = set(recipe_differences(*recipes))
    assert differences - OF_THE_ALGORITHM == own | {f"output_dir: 'output/{base}' -> 'output/{name}'"}


@pytest.mark.parametrize(
    ("name", "target", "mesh", "length"),
    [
        ("quickstart", "output/quickstart-target", (2, 2, 1), 2048),
        ("llama3.1-8b_128k_usp", "meta-llama/Llama-3.1-8B-Instruct", (4, 2, 1), 131072),
        ("qwen3-8b_128k_usp", "Qwen/Qwen3-8B", (8, 1, 1), 131072),
    ],
)
def test_what_the_bases_say(name: str, target: str, mesh: tuple[int, int, int], length: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.target.path, recipe.data.max_length) == (target, length)
    assert (recipe.parallel.ulysses, recipe.parallel.ring, recipe.parallel.draft_dp) == mesh
    assert (recipe.draft.algorithm, recipe.draft.ttt_steps, recipe.draft.num_layers) == ("eagle3", 7, 1)
    assert recipe.output_dir == f"output/{name}"
    of_training = (recipe.train.learning_rate, recipe.train.warmup_steps, recipe.train.eval_every)
    if name == "quickstart":
        assert of_training == (2e-3, 15, 60) and recipe.train.steps == 300
        assert (recipe.deepspeed, recipe.draft.vocab_size, recipe.eval.num_prompts) == ("zero3", 768, 64)
    else:
        assert of_training == (1e-4, 100, 500) and recipe.train.epochs == 2
        assert (recipe.deepspeed, recipe.draft.vocab_size, recipe.train.save_every) == ("zero2", 32000, 500)
        assert (recipe.train.accumulation, recipe.data.on_too_long) == (4, "drop")
