"""The recipe and the DeepSpeed JSON: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eagle3_ds.config import Recipe, dump_recipe, fill_deepspeed_config, load_deepspeed_config, load_recipe
from eagle3_ds.config.deepspeed import REFUSED
from eagle3_ds.config.load import read_recipe, recipe_differences
from eagle3_ds.run.checks import check_data

ROOT = Path(__file__).parents[2]
SIZES_ALONE = ["inferred: draft.vocab_size", "inferred: data.max_length"]
MINIMAL = """
target: {path: some/target}
data: {train: [stdlib]}
train: {steps: 10}
deepspeed: ds_configs/zero2.json
output_dir: output/run
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str = MINIMAL, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_minimal_recipe_has_the_defaults_and_survives_a_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.draft.ttt_steps, recipe.loss.decay, recipe.parallel.zero_group) == (7, 0.8, "all")
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    text = MINIMAL.replace("{steps: 10}", "{steps: 010, learning_rate: 1e-4, eps: 1E-7, weight_decay: 1}")
    train = load_recipe(write(tmp_path, text)).train
    assert (train.steps, train.learning_rate, train.eps, train.weight_decay) == (10, 1e-4, 1e-7, 1.0)
    # YAML 1.1 makes false of `no` and an integer of 1:30.
    assert load_recipe(write(tmp_path, MINIMAL), ["output_dir=no"]).output_dir == "no"
    assert load_recipe(write(tmp_path, MINIMAL), ["output_dir=1:30"]).output_dir == "1:30"


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "parallel.ulysses=4",
        "data.train=[a.jsonl, b.jsonl]",
        "train.learning_rate=3e-5",
        "train.steps=null",
    ]
    recipe = load_recipe(write(tmp_path, MINIMAL), [*overrides, "train.epochs=2"])
    assert recipe.parallel.ulysses == 4
    assert recipe.data.train == ("a.jsonl", "b.jsonl")
    assert (recipe.train.learning_rate, recipe.train.steps, recipe.train.epochs) == (3e-5, None, 2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.ulises=4", ["parallel.ulises", "unknown key", "Did you mean `ulysses`?"]),
        ("target.build.vocab=4", ["target.build.vocab", "unknown key", "vocab_size"]),
        ("paralel.ulysses=4", ["paralel", "unknown key", "Did you mean `parallel`?"]),
        ("parallel.ulysses=four", ["parallel.ulysses", '"four"', "a valid integer"]),
        ("parallel.ulysses=0", ["parallel.ulysses", "0", "greater than 0"]),
        ("parallel.ulysses=2.0", ["parallel.ulysses", "2.0", "integer"]),
        ("train.learning_rate=.nan", ["train.learning_rate", "finite"]),
        ("data.train=[]", ["data.train", "[]", "at least 1 item"]),
        ("attention.kernel=flesh", ["attention.kernel", '"flesh"', "'blockwise'"]),
        ("train.epochs=1", ["train.steps is 10 and train.epochs is 1", "exactly one"]),
        ("train.warmup_steps=11", ["train.warmup_steps is 11", "10 steps", "Lower it"]),
        ("eval.context_buckets=[2048, 512]", ["context_buckets", "[2048, 512]", "ascend"]),
        ("draft={num_heads: 6, num_kv_heads: 4}", ["num_heads is 6 and num_kv_heads is 4", "divisor"]),
        (
            "draft={ttt_steps: 7, sliding_window: 6}",
            ["sliding_window = 6 is less than ttt_steps = 7", "or null"],
        ),
        (
            "draft={aux_norm: true, norm_before_fc: true}",
            ["draft.aux_norm and draft.norm_before_fc", "['vllm', 'speculators']", "speculators 0.9"],
        ),
        (
            "draft={algorithm: dflash, ttt_steps: 7}",
            [
                "draft: ttt_steps is 7 and algorithm is 'dflash'",
                "block_size - 1 guesses",
                "Remove it, or set",
            ],
        ),
        (
            "draft={algorithm: dflash, aux_norm: false, norm_output: true}",
            [
                "aux_norm is false, norm_output is true and algorithm is 'dflash'",
                "Remove them, or set algorithm",
            ],
        ),
        (
            "draft={block_size: 8}",
            ["block_size is 8 and algorithm is 'eagle3'", "Remove it, or set algorithm to dflash"],
        ),
        ("draft={algorithm: dflash, block_size: 1}", ["draft.block_size", "greater than or equal to 2"]),
        ("draft={algorithm: dflash, anchor_share: 0}", ["draft.anchor_share", "greater than 0"]),
        (
            "draft={algorithm: dflash, sliding_window: 8}",
            ["sliding_window = 8 is less than block_size + 1 = 9", "or null"],
        ),
        ("loss.mask_alignment=predicted", ["loss.mask_alignment is predicted and draft.algorithm is eagle3"]),
        ("target.build={hidden_size: 190}", ["hidden_size is 190", "num_heads"]),
        ("parallel.ulysses", ["'parallel.ulysses'", "section.key=value"]),
        ("output_dir.name=x", ["output_dir is a value", "not a section"]),
    ],
)
def test_what_is_refused_names_key_value_rule_and_fix(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    message = refusal(tmp_path, overrides=(override,))
    for word in words:
        assert word in message, message


DFLASH = MINIMAL + "draft: {algorithm: dflash}\n"


def test_keys_of_a_block(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, DFLASH), ["loss.mask_alignment=predicted"])
    assert (recipe.draft.num_guesses, recipe.eval.draft_tokens, recipe.draft.anchor_share) == (7, 7, 1.0)
    # What the algorithm has not is not written out either, so that the recipe can be read again.
    dumped = dump_recipe(recipe)
    assert "ttt_steps" not in dumped and "block_size: 8" in dumped
    assert load_recipe(write(tmp_path, dumped)) == recipe
    assert "block_size" not in dump_recipe(load_recipe(write(tmp_path, MINIMAL)))
    shorter = ["eval.draft_tokens=3", "draft={algorithm: dflash, block_causal: true}"]
    assert load_recipe(write(tmp_path, DFLASH), shorter).eval.draft_tokens == 3


@pytest.mark.parametrize(
    ("overrides", "guesses", "line"),
    [
        ((), 7, None),
        (("draft.ttt_steps=5",), 5, "eval.draft_tokens = 5, as many guesses as draft.ttt_steps trains"),
        (("draft={algorithm: peagle, ttt_steps: 4}",), 4, "eval.draft_tokens = 4, as many guesses as"),
        (("draft={algorithm: dflash}",), 7, None),
        (
            ("draft={algorithm: dflash, block_size: 16}",),
            15,
            "15, as many guesses as draft.block_size trains",
        ),
        (("draft.ttt_steps=5", "eval.draft_tokens=3"), 3, None),
    ],
)
def test_guesses_of_a_round_are_those_that_are_trained(
    tmp_path: Path, overrides: tuple[str, ...], guesses: int, line: str | None
) -> None:
    recipe, told = read_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.eval.draft_tokens == guesses
    lines = [each for each in told if "eval.draft_tokens" in each]
    assert (line is None and not lines) or (line is not None and len(lines) == 1 and line in lines[0])
    again, told = read_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe and not [each for each in told if "eval.draft_tokens" in each]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("eval.draft_tokens=3",), "eval.draft_tokens is 3 and draft.block_size is 8, which makes 7 guesses"),
        (("eval.draft_tokens=8", "draft.block_causal=true"), "no more of them are trained"),
        (("loss.mask_alignment=reference",), "reference and draft.algorithm is dflash"),
        (("train.activation=offload",), "train.activation is offload and draft.algorithm is dflash"),
        (
            ("draft.anchor_share=0.5", "data.hidden_states=online"),
            "draft.anchor_share is 0.5 and data.hidden_states is online",
        ),
    ],
)
def test_what_a_block_cannot_be(tmp_path: Path, overrides: tuple[str, ...], words: str) -> None:
    assert words in refusal(tmp_path, DFLASH, overrides)


def test_a_draft_starts_from_one_place(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, ("draft.start=lookup", "train.init_from=draft"))
    assert "draft.start is 'lookup' and train.init_from is 'draft'" in message
    assert "Remove the other" in message


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        MINIMAL.replace("output_dir: output/run", "outputdir: x").replace("target:", "targets:"),
        ("parallel.ring=0",),
    )
    assert "4 problems" in message
    for words in (
        "outputdir: unknown key. Did you mean `output_dir`?",
        "target: required",
        "parallel.ring",
    ):
        assert words in message


def test_duplicate_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "output_dir: again\n")
    assert "line 7: the key `output_dir` is given twice, first on line 6" in message
    assert "given twice" in refusal(tmp_path, MINIMAL.replace("{steps: 10}", "{steps: 10, steps: 11}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "a mapping of sections, not list"),
        ("a: [", "not valid YAML"),
        ("1: 2", "the key 1 is not text"),
    ],
)
def test_not_a_recipe(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_missing_recipe() -> None:
    with pytest.raises(ValueError, match="nowhere.yaml is not a file"):
        load_recipe("nowhere.yaml")


def test_differences(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    changed = load_recipe(path, ["train.seed=3", "target.build={}"])
    differences = recipe_differences(load_recipe(path), changed)
    assert "train.seed: 0 -> 3" in differences
    assert any(line.startswith("target.build: None -> ") for line in differences)


def test_docs_explain_every_key() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    schema = Recipe.model_json_schema()
    sections = {**schema["$defs"], "Recipe": schema}
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key in section["properties"]
        if f"`{key}`" not in text
    ]
    assert not missing


# DeepSpeed JSON


def write_json(folder: Path, value: object) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_deepspeed_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_deepspeed_config(write_json(tmp_path, {key: {}, "zero_optimization": {"stage": 2}}))
    assert f"`{key}` is refused: {REFUSED[key][0]}" in str(caught.value)


def test_broken_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for text, words in [
        ("{", "not valid JSON"),
        ("[]", "a JSON object, not list"),
        ('{"a": 1, "a": 2}', "the key `a` is given twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_deepspeed_config(path)
    with pytest.raises(ValueError, match="is not a file"):
        load_deepspeed_config(tmp_path / "none.json")


@pytest.mark.parametrize(("zero_group", "batch"), [("all", 24), ("draft_dp", 6)])
def test_filled_batch_sizes_agree_with_deepspeeds_own_world(
    tmp_path: Path, zero_group: str, batch: int
) -> None:
    overrides = ["train.accumulation=3", "train.dtype=float32", f"parallel.zero_group={zero_group}"]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    user = {"zero_optimization": {"stage": 2}, "comms_logger": {"enabled": True}}
    filled = fill_deepspeed_config(user, recipe, world=8, draft_dp=2)
    assert filled["train_batch_size"] == batch
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["train_micro_batch_size_per_gpu"] == 1
    assert filled["gradient_clipping"] == recipe.train.gradient_clipping
    assert filled["bf16"] == {"enabled": False}
    assert filled["comms_logger"] == {"enabled": True}
    assert "train_batch_size" not in user


def test_an_optimizer_on_nvme_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    user = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ValueError, match="offload_optimizer.device is nvme: a checkpoint cannot hold"):
        fill_deepspeed_config(user, recipe, 8, 2)
    for device in ({"device": "cpu"}, None):
        fill_deepspeed_config({"zero_optimization": {"stage": 3, "offload_optimizer": device}}, recipe, 8, 2)


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulated", "words"),
    [
        (
            1,
            "bfloat16",
            "fp32",
            "is 'fp32' with train.dtype bfloat16 at ZeRO stage 1: DeepSpeed then takes an optimizer",
        ),
        (1, "bfloat16", "torch.float32", "is 'torch.float32' with train.dtype bfloat16 at ZeRO stage 1"),
        (
            0,
            "bfloat16",
            "float32",
            "at ZeRO stage 0: without ZeRO, DeepSpeed accumulates gradients in train.dtype alone",
        ),
        (0, "float32", "bf16", "Remove it, or use stage 2 or 3, for example ds_configs/zero2.json"),
        (
            2,
            "bfloat16",
            "fp64",
            "is 'fp64', which is no dtype of DeepSpeed's. Set it to one of fp32, float32,",
        ),
        (2, "bfloat16", ["fp32"], "which is no dtype"),
        (0, "bfloat16", "bf16", None),
        (1, "float32", "fp32", None),
        (1, "bfloat16", None, None),
        (2, "bfloat16", "fp32", None),
        (3, "bfloat16", "fp32", None),
    ],
)
def test_gradients_accumulate_in_a_dtype_that_the_stage_can_have(
    tmp_path: Path, stage: int, dtype: str, accumulated: object, words: str | None
) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), [f"train.dtype={dtype}"])
    user: dict[str, dict[str, object]] = {
        "zero_optimization": {"stage": stage},
        "data_types": {"grad_accum_dtype": accumulated},
    }
    if words is None:
        assert fill_deepspeed_config(user, recipe, 8, 2)["data_types"] == user["data_types"]
        return
    with pytest.raises(ValueError) as caught:
        fill_deepspeed_config(user, recipe, 8, 2)
    assert "data_types.grad_accum_dtype is" in str(caught.value) and words in str(caught.value)
    offloaded = {**user["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    if stage == 1:
        fill_deepspeed_config({**user, "zero_optimization": offloaded}, recipe, 8, 2)


@pytest.mark.parametrize("key", ["zero_optimization", "data_types"])
def test_a_part_of_the_deepspeed_json_that_is_no_object_is_refused(tmp_path: Path, key: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    values: tuple[object, ...] = (True, None, [])
    for value in values:
        with pytest.raises(ValueError, match=f"`{key}` is {re.escape(json.dumps(value))}: it must be"):
            fill_deepspeed_config({key: value}, recipe, 8, 2)


def test_secondary_partitions_must_fit(tmp_path: Path) -> None:
    user = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (
        fill_deepspeed_config(user, recipe, world=8, draft_dp=8)["zero_optimization"]
        == user["zero_optimization"]
    )
    with pytest.raises(ValueError, match="is 4, which does not divide the 6 ranks"):
        fill_deepspeed_config(user, recipe, world=6, draft_dp=6)
    with pytest.raises(ValueError, match="zero_group: all"):
        recipe = load_recipe(write(tmp_path, MINIMAL), ["parallel.zero_group=draft_dp"])
        fill_deepspeed_config(user, recipe, world=8, draft_dp=8)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_configs_pass(path: Path, tmp_path: Path) -> None:
    user = load_deepspeed_config(path)
    fill_deepspeed_config(user, load_recipe(write(tmp_path, MINIMAL)), world=8, draft_dp=1)
    assert path.stem.startswith(f"zero{user['zero_optimization']['stage']}")


def test_a_deepspeed_json_is_found_from_where_one_is_and_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "recipes").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "home" / "recipes" / "r.yaml"
    recipe.write_text(MINIMAL.replace("ds_configs/zero2.json", "one.json"))
    assert "one.json" in recipe.read_text()
    assert load_recipe(recipe).deepspeed == "one.json"
    for place in (tmp_path / "home" / "one.json", recipe.parent / "one.json"):
        place.write_text("{}")
        assert load_recipe(recipe).deepspeed == str(place)
    Path("one.json").write_text("{}")
    assert load_recipe(recipe).deepspeed == "one.json", "the working directory comes first"
    with pytest.raises(ValueError, match=r"nor from the recipe's folder or the one above it"):
        load_deepspeed_config(load_recipe(recipe, ["deepspeed=two.json"]).deepspeed)
    assert load_recipe(recipe, [f"deepspeed={'x' * 5000}"]).deepspeed == "x" * 5000, "refused by who reads it"


def test_a_shipped_name_is_found_from_anywhere_and_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, told = read_recipe("quickstart")
    assert told == (
        f"recipe: quickstart is no file here; taken: the shipped {ROOT / 'recipes/quickstart.yaml'}",
        "inferred: output_dir = output/quickstart, by the name of the recipe",
    )
    assert recipe.deepspeed == "zero3" and load_deepspeed_config("zero3.json") == load_deepspeed_config(
        "zero3"
    )
    assert load_deepspeed_config("zero3")["zero_optimization"]["stage"] == 3
    Path("quickstart").write_text(MINIMAL)
    recipe, told = read_recipe("quickstart")
    assert recipe.output_dir == "output/run"
    assert [line.partition(" = ")[0] for line in told] == SIZES_ALONE
    with pytest.raises(ValueError, match=r"shipped name: quickstart, quickstart_"):
        load_recipe("quikstart")
    with pytest.raises(ValueError, match=r"shipped name: zero3_hpz, zero3"):
        load_deepspeed_config("zero3_hp")


def test_deepspeed_keys_may_stand_in_the_recipe(tmp_path: Path) -> None:
    text = MINIMAL.replace("deepspeed: ds_configs/zero2.json", "deepspeed: {zero_optimization: {stage: 1}}")
    recipe = load_recipe(write(tmp_path, text), ["deepspeed.zero_optimization.stage=2"])
    config = load_deepspeed_config(recipe.deepspeed)
    assert config == {"zero_optimization": {"stage": 2}}
    config["zero_optimization"]["stage"] = 0
    assert recipe.deepspeed == {"zero_optimization": {"stage": 2}}, "what is read is a copy"
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    wrong = load_recipe(write(tmp_path, text), ["deepspeed.zero_optimisation={}"])
    with pytest.raises(
        ValueError, match=r"the recipe's deepspeed section:\n.*Did you mean `zero_optimization`"
    ):
        load_deepspeed_config(wrong.deepspeed)
    with pytest.raises(ValueError, match=r"deepspeed: the value is 3, but it should be the path"):
        load_recipe(write(tmp_path, text), ["deepspeed=3"])


def test_what_the_file_leaves_out_is_inferred_and_told(tmp_path: Path) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(("deepspeed:", "output_dir:"))]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines))
    recipe, told = read_recipe(path)
    assert (recipe.deepspeed, recipe.output_dir) == ("zero2", "output/mine")
    names = ["inferred: deepspeed", "inferred: output_dir", *SIZES_ALONE]
    assert [line.partition(" = ")[0] for line in told] == names
    given = ["deepspeed=zero0", "output_dir=o", "draft.vocab_size=9", "data.max_length=8"]
    other, told = read_recipe(path, given)
    assert (other.deepspeed, other.output_dir, told) == ("zero0", "o", ())
    assert (other.draft.vocab_size, other.data.max_length) == (9, 8)
    path.write_text(dump_recipe(recipe))
    assert read_recipe(path) == (recipe, ()), "the resolved recipe leaves nothing to be inferred"


@pytest.mark.parametrize(
    ("config", "vocabulary", "length"),
    [
        ({"vocab_size": 151936, "max_position_embeddings": 40960}, 32000, 4096),
        ({"vocab_size": 320, "max_position_embeddings": 512}, 320, 512),
        ({"text_config": {"vocab_size": 320}, "vocab_size": 7, "max_position_embeddings": 9}, 320, 4096),
        ({"vocab_size": "many", "max_position_embeddings": 0}, 32000, 4096),
        ([], 32000, 4096),
        (None, 32000, 4096),
    ],
)
def test_sizes_left_out_are_the_usual_ones_or_the_targets_where_those_are_smaller(
    config: object, vocabulary: int, length: int, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    if config is not None:
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
    recipe, told = read_recipe(write(tmp_path, MINIMAL), [f"target.path={target}"])
    assert (recipe.draft.vocab_size, recipe.data.max_length) == (vocabulary, length)
    assert [line.partition(", ")[0] for line in told] == [
        f"inferred: draft.vocab_size = {vocabulary}",
        f"inferred: data.max_length = {length}",
    ]


def test_sizes_of_a_target_that_is_built_are_those_of_its_build(tmp_path: Path) -> None:
    build = ["target.build.vocab_size=500", "target.build.max_positions=99"]
    recipe, told = read_recipe(write(tmp_path, MINIMAL), build)
    assert (recipe.draft.vocab_size, recipe.data.max_length) == (500, 99)
    assert told[0].endswith("all of the target's vocab_size")


def test_a_recipe_without_data_is_one_for_rollouts_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(line for line in MINIMAL.splitlines() if not line.startswith("data:")))
    recipe = load_recipe(path)
    assert recipe.data.train is None and recipe.data.max_length == 4096
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    with pytest.raises(ValueError, match=r"data.train: required and not given"):
        check_data(recipe)
    with pytest.raises(ValueError, match=r"data.train: the value is \[\]"):
        load_recipe(path, ["data.train=[]"])
