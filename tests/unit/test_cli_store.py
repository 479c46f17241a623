"""`eagle3-ds store`: verifying, describing, and importing with the target as the judge."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.data import PackedLoader, PreparedData
from eagle3_ds.run.import_check import compare_with_target
from eagle3_ds.store import HiddenStateStore
from eagle3_ds.store.foreign import open_foreign
from eagle3_ds.targets import capture_hidden_states, load_target, teacher_tokens
from tests.unit.test_data_import import FOREIGN, KINDS
from tests.unit.test_data_store import filled

RECIPE = """
target: {path: %s, dtype: bfloat16}
draft: {vocab_size: 32}
data: {train: [%s], cache_dir: %s, max_length: 100}
train: {steps: 1}
eval: {num_prompts: 0}
deepspeed: none.json
output_dir: %s
"""


def say(capsys, *arguments):
    """Status and output of a command."""
    status = main(["store", *map(str, arguments)])
    done = capsys.readouterr()
    return status, done.out + done.err


def test_verify_and_info(tmp_path, capsys):
    digest = "0123456789abcdef" * 4
    store = filled(tmp_path / "s", dtype="float8", fingerprint={"documents": "d1", "weights": digest})
    status, text = say(capsys, "verify", store.path)
    assert status == 0 and "every checksum is right" in text
    status, text = say(capsys, "info", store.path)
    assert status == 0
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    rows = dict(cells)
    assert (rows["documents"], rows["tokens"], rows["longest"], rows["dtype"]) == ("4", "18", "9", "float8")
    assert (rows["aux"], rows["computed by"], rows["made from: documents"]) == ("6 wide", "capture", "d1")
    told = [value for _, value in cells]
    assert digest in "".join(told), "a fingerprint is folded, not cut"
    path = store.path / next(iter(store.shards))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, text = say(capsys, "verify", store.path)
    assert status == 2 and f"{path.name}, " in text and ", row" in text
    status, text = say(capsys, "verify", tmp_path / "none")
    assert status == 2 and "no hidden-state store" in text


def test_actions_are_told(capsys):
    status, text = say(capsys, "--help")
    assert status == 0 and "verify" in text and "import" in text
    assert say(capsys)[0] == 2
    status, text = say(capsys, "repair")
    assert status == 2 and "there is no action 'repair'. Actions: verify, info, import." in text
    assert main(["--help"]) == 0 and "store verify | info | import" in capsys.readouterr().out


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    places = (FOREIGN / "target", tmp_path / "rows.jsonl", tmp_path / "cache", tmp_path / "out")
    path.write_text(RECIPE % places)
    return path


@pytest.mark.parametrize("skip_check", [(), ("--skip-check",)])
@pytest.mark.parametrize("kind", ["specforge", "speculators", "speculators-0.4"])
def test_import(recipe, tmp_path, capsys, kind, skip_check):
    aux_layers, writer = KINDS[kind]
    layers = () if kind != "speculators-0.4" else ("target.aux_layers=[3, 5, 6]",)
    command = ("import", recipe, *layers, "--from", FOREIGN / kind, *skip_check)
    status, text = say(capsys, *command)
    assert status == 0, text
    assert ("is what the target computes, to a relative error of" in text) == (not skip_check)
    assert "4 rows of 57 tokens; left out: " in text and "kB as bfloat16 in " in text
    assert text.count("taken on trust: ") == 2 and ("of the inputs of its layers" in text) == bool(skip_check)
    (path,) = (tmp_path / "cache").glob("hidden-*")
    store = HiddenStateStore.open(path)
    store.verify()
    assert store.origin.startswith(writer)
    before = (path / "index.json").stat().st_mtime_ns
    status, text = say(capsys, *command)
    assert status == 0 and f"there already, computed by {writer}" in text
    assert (
        main(["prepare", str(recipe), *layers]) == 0 and f"hidden states: {path}" in capsys.readouterr().out
    )
    assert (path / "index.json").stat().st_mtime_ns == before
    check_against_target(tmp_path / "out" / "prepared.json", aux_layers)


def check_against_target(prepared, aux_layers):
    """What the training would load is what the target computes for these documents, in one sequence."""
    found = json.loads(prepared.read_text())
    data = PreparedData.open(Path(found["data"]), found["data_fingerprint"])
    store = HiddenStateStore.open(found["store"], found["store_fingerprint"])
    assert len(data.train) + len(data.heldout) == 4
    target = load_target(TargetSection(path=str(FOREIGN / "target"), aux_layers=aux_layers))
    for loader in (PackedLoader(side, store, 100) for side in (data.train, data.heldout)):
        (pack,) = loader.step(0)
        states = [capture_hidden_states(target, document) for document in pack.token_ids.split(pack.lengths)]
        aux, teacher = (torch.cat(column) for column in zip(*states, strict=True))
        assert close(pack.aux[:], aux) and close(pack.teacher[:], teacher)
        assert torch.equal(pack.teacher_token, teacher_tokens(pack.teacher[:], target.head))
        assert pack.loss_mask.any()


def close(rows, reference):
    return float((rows - reference).float().norm() / reference.float().norm()) < 0.02


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("specforge", ("target.aux_layers=[1, 4, 5]",), "holds the inputs of layers [2, 4, 5] of the target"),
        (
            "speculators-0.4",
            (),
            "holds the inputs of layers [3, 5, 6] of the target, and the recipe wants those of [2, 4, 5]",
        ),
        (
            "speculators-0.4",
            ("--skip-check",),
            "writes the inputs of layers [3, 5, 6] of a target of 8 layers",
        ),
        ("specforge", ("data.train=[a.jsonl, b.jsonl]",), "data.train is ['a.jsonl', 'b.jsonl']"),
        ("specforge", ("data.train=[rows.parquet]",), "the one .jsonl file in data.train"),
        ("specforge", ("data.heldout=[b.jsonl]",), "data.heldout ['b.jsonl']"),
        ("target", (), "neither files of SpecForge"),
    ],
)
def test_an_import_that_does_not_fit_is_refused_before_anything_is_written(
    recipe, tmp_path, capsys, monkeypatch, kind, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, text = say(capsys, "import", recipe, "--from", FOREIGN / kind, *arguments)
    assert status == 2 and message in text, text
    assert sorted(tmp_path.rglob("*")) == before


def other_target(tmp_path, change):
    """The target with its weights changed."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(FOREIGN / "target", tmp_path / "target"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return load_target(TargetSection(path=str(folder), aux_layers=(2, 4, 5)), dtype="bfloat16")


def negated_embedding(weights):
    weights["model.embed_tokens.weight"] *= -1


def flat_norm(weights):
    weights["model.norm.weight"].fill_(1)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("specforge", negated_embedding, "data_0.ckpt: these hidden states are not the target's"),
        (
            "specforge",
            flat_norm,
            "should lie behind the target's final norm and is 0... away from it .* from the other side",
        ),
        ("speculators", negated_embedding, "hs_0.safetensors: these hidden states are not the target's"),
    ],
)
def test_files_of_another_target_are_seen(tmp_path, kind, change, message):
    with pytest.raises(ValueError, match=message):
        list(compare_with_target(open_foreign(FOREIGN / kind), other_target(tmp_path, change)))


def test_states_on_the_other_side_of_the_norm_are_seen():
    files = open_foreign(FOREIGN / "speculators")
    files.last_is_normed = True
    target = load_target(TargetSection(path=str(FOREIGN / "target")), dtype="bfloat16")
    with pytest.raises(
        ValueError, match="should lie behind the target's final norm .*0.00 from the other side"
    ):
        list(compare_with_target(files, target))


def test_another_vocabulary_or_width_is_seen(tmp_path, recipe, capsys):
    rows = datasets.load_from_disk(str(FOREIGN / "speculators"))
    folder = Path(shutil.copytree(FOREIGN / "target", tmp_path / "wide"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    status, text = say(capsys, "import", recipe, "--from", FOREIGN / "specforge", f"target.path={folder}")
    assert status == 2 and "holds hidden states of 16, the target's are 32 wide" in text
    assert max(max(row["input_ids"]) for row in rows) < 64
    files = open_foreign(FOREIGN / "specforge")
    target = load_target(TargetSection(path=str(FOREIGN / "target")), dtype="bfloat16")
    target.model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="data_0.ckpt holds token .*, and the target's vocabulary has 20"):
        list(compare_with_target(files, target))
