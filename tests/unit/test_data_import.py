"""Import of the files in data/foreign, which SpecForge and speculators wrote, held against the target's own
hidden states.
"""

import gzip
import json
import pickle
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3_ds.config import TargetSection
from eagle3_ds.data.documents import FEATURES
from eagle3_ds.store.foreign import open_foreign
from eagle3_ds.store.importer import fill_store, match_documents, write_rows
from eagle3_ds.store.index import RowFormat
from eagle3_ds.store.writer import HiddenStateWriter
from eagle3_ds.targets import capture_hidden_states, load_target, teacher_tokens

FOREIGN = Path(__file__).parent / "data" / "foreign"
LENGTHS = [9, 12, 16, 20]
RULE, LATER = (2, 4, 5), (3, 5, 6)
KINDS = {
    "specforge": (RULE, "SpecForge"),
    "specforge-gz": (RULE, "SpecForge"),
    "speculators": (RULE, "speculators generate-offline-data"),
    "speculators-0.4": (LATER, "speculators 0.3 / 0.4"),
}


@pytest.fixture
def folder(request, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(FOREIGN / request.param, tmp_path / request.param))


def on_all(argument="folder"):
    return pytest.mark.parametrize(argument, KINDS, indirect=argument == "folder")


@pytest.fixture(scope="module", params=KINDS)
def imported(request):
    """The files of a writer, and the target whose hidden states they hold, in their precision."""
    section = TargetSection(path=str(FOREIGN / "target"), aux_layers=KINDS[request.param][0])
    return open_foreign(FOREIGN / request.param), load_target(section, dtype="bfloat16")


def error(rows, reference):
    """Relative error of the hidden states, the largest over the rows."""
    return float(((rows - reference).float().norm(dim=-1) / reference.float().norm(dim=-1)).max())


def test_files_of_every_writer_hold_what_the_target_computes(imported):
    """The inputs of the three layers and of no other; kernels and batches of another shape round bfloat16
    otherwise.
    """
    files, target = imported
    lengths = []
    for index in range(len(files)):
        sample = files.sample(index)
        length = len(sample.token_ids)
        with torch.no_grad():
            inputs = target.model(sample.token_ids[None], output_hidden_states=True).hidden_states[:-1]
            normed = sample.last if files.last_is_normed else target.model.model.norm(sample.last)
        aux, last = sample.states(0, length)
        assert torch.equal(last, sample.last) and aux.shape == (length, 48)
        for part, layer in zip(aux.split(16, dim=-1), target.aux_layers, strict=True):
            errors = [error(part, other[0]) for other in inputs]
            assert errors.pop(layer) < 0.05 and min(errors) > 0.2
        _, teacher = capture_hidden_states(target, sample.token_ids)
        assert error(normed, teacher) < 0.05 and error(target.model.model.norm(teacher), teacher) > 0.2
        assert sample.loss_mask.dtype == torch.bool and sample.loss_mask.any() and not sample.loss_mask[0]
        lengths.append(length)
    assert sorted(lengths) == LENGTHS


@on_all("kind")
def test_the_layers_and_the_writer_are_known(kind):
    aux_layers, writer = KINDS[kind]
    files = open_foreign(FOREIGN / kind)
    assert files.writer.startswith(writer) and files.aux_layers(8) == aux_layers


@on_all("kind")
def test_all_writers_were_given_the_same_tokens_and_masks(kind):
    def rows(files):
        samples = [files.sample(index) for index in range(len(files))]
        return sorted((sample.token_ids.tolist(), sample.loss_mask.tolist()) for sample in samples)

    assert rows(open_foreign(FOREIGN / kind)) == rows(open_foreign(FOREIGN / "specforge"))


def prepared(path, max_length=100):
    """Documents as the preparation makes them of these rows, the first held out."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = [
        {
            "input_ids": row["input_ids"][:max_length],
            "loss_mask": [bool(flag) for flag in row["loss_mask"][:max_length]],
        }
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(
        [row | {"document_id": i} for i, row in enumerate(made)], features=FEATURES
    )
    return dataset.select([0]), dataset.select(range(1, len(made)))


@pytest.mark.parametrize("max_length", [100, 10])
def test_a_store_holds_the_rows_of_the_files(imported, max_length, tmp_path):
    """Also where documents are truncated: what comes after a token does not change its hidden state."""
    files, target = imported
    found = write_rows(files, tmp_path / "rows.jsonl", max_length)
    assert (found.rows, found.tokens) == (4, sum(LENGTHS))
    assert found.text.endswith("rows of padding" if files.last_is_normed else "left out: nothing")
    sides = prepared(tmp_path / "rows.jsonl", max_length)
    documents = {row["document_id"]: row["input_ids"] for side in sides for row in side}
    lengths = {document: len(tokens) for document, tokens in documents.items()}
    writer = HiddenStateWriter(tmp_path / "s", lengths, RowFormat(48, 16, "bfloat16"), {}, shard_bytes=1000)

    @torch.no_grad()
    def finish(last):
        teacher = last if files.last_is_normed else target.model.model.norm(last)
        return teacher, teacher_tokens(teacher, target.head)

    matches = match_documents(sides, found)
    fill_store(files, matches, writer, finish)
    store = writer.finish()
    for index, (document,) in matches.items():
        sample, length = files.sample(index), lengths[document]
        aux, last = sample.states(0, length)
        teacher, token = finish(last)
        assert documents[document] == sample.token_ids[:length].tolist()
        assert torch.equal(store.rows(document, "aux", 0, length), aux)
        assert torch.equal(store.rows(document, "teacher", 0, length), teacher)
        assert torch.equal(store.rows(document, "teacher_token", 0, length), token.int())


def test_a_document_that_begins_no_sample_is_refused(tmp_path):
    files = open_foreign(FOREIGN / "speculators")
    found = write_rows(files, tmp_path / "rows.jsonl", 100)
    train, heldout = prepared(tmp_path / "rows.jsonl")
    middle = datasets.Dataset.from_list(
        [row | {"input_ids": row["input_ids"][3:]} for row in train], features=FEATURES
    )
    with pytest.raises(ValueError, match="document 0 with .* is not the beginning of an imported sample"):
        match_documents([middle, heldout], found)


def test_rows_are_not_written_over_other_rows(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(open_foreign(FOREIGN / "speculators"), path, 100)
    before = path.read_text()
    write_rows(open_foreign(FOREIGN / "speculators"), path, 100)
    assert path.read_text() == before
    with pytest.raises(ValueError, match="rows.jsonl exists and holds other rows"):
        write_rows(open_foreign(FOREIGN / "specforge"), path, 100)
    assert path.read_text() == before and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("folder", ["speculators"], indirect=True)
def test_samples_without_states_or_supervision_are_counted(folder, tmp_path):
    (folder / "hidden_states" / "hs_2.safetensors").unlink()
    rows = datasets.load_from_disk(str(folder))
    blank = rows.map(lambda row, index: {"loss_mask": row["loss_mask"] * (index > 0)}, with_indices=True)
    blank.save_to_disk(str(tmp_path / "blank"))
    files = open_foreign(tmp_path / "blank", folder / "hidden_states")
    found = write_rows(files, tmp_path / "rows.jsonl", 100)
    assert found.text.startswith("2 rows of")
    assert "1 samples without hidden states, 1 samples without a supervised token" in found.text
    for file in (folder / "hidden_states").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="none of the 4 samples of speculators .* can teach"):
        write_rows(files, tmp_path / "none.jsonl", 100)
    assert not (tmp_path / "none.jsonl").exists()


# Bad files


def first_file(folder):
    return sorted(
        path for path in folder.rglob("*_0.*") if path.suffix in (".ckpt", ".gz", ".pt", ".safetensors")
    )[0]


@on_all()
def test_a_file_cut_short_is_named(folder):
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=f"{path.name} (cannot be read as tensors|is damaged)"):
        open_foreign(folder).sample(0)


@pytest.mark.parametrize("folder", ["specforge", "specforge-gz", "speculators-0.4"], indirect=True)
def test_a_pickle_that_would_run_code_is_not_loaded(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = first_file(folder)
    content = pickle.dumps({"input_ids": Bomb()}, protocol=2)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as tensors"):
        open_foreign(folder).sample(0)
    torch.save({"input_ids": Bomb()}, tmp_path / "saved")
    saved = (tmp_path / "saved").read_bytes()
    path.write_bytes(gzip.compress(saved) if path.suffix == ".gz" else saved)
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as tensors .*holds more than data"):
        open_foreign(folder).sample(0)
    assert not (tmp_path / "ran").exists()


def spoil_pickle(change):
    def spoil(folder):
        path = first_file(folder)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return spoil


def spoil_safetensors(change):
    def spoil(folder):
        path = first_file(folder)
        content = load_file(path)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)

    return spoil


def cut(name, rows=3):
    return lambda content: content.update({name: content[name][:rows]})


@pytest.mark.parametrize(
    ("folder", "spoil", "message"),
    [
        (
            "specforge",
            spoil_pickle(lambda c: c.pop("hidden_state")),
            r"has no tensor hidden_state \(keys present: input_ids",
        ),
        ("specforge", spoil_pickle(cut("loss_mask")), "loss_mask has 3 rows and input_ids 20"),
        ("specforge", spoil_pickle(lambda c: c["loss_mask"].fill_(2)), "loss_mask holds 2, expected 0 and 1"),
        (
            "specforge",
            spoil_pickle(lambda c: c.update(hidden_state=c["hidden_state"][..., :5])),
            "48 wide, expected 1 to 8 times the last state.s 5",
        ),
        (
            "specforge",
            spoil_pickle(lambda c: c.update(hidden_state=c["hidden_state"][0, 0])),
            r"expected \[1, tokens, width\]",
        ),
        (
            "speculators",
            spoil_safetensors(lambda c: c["token_ids"].add_(1)),
            "other tokens than row 0 of the data set",
        ),
        (
            "speculators",
            spoil_safetensors(lambda c: c.update(hidden_states=c["hidden_states"][:, :3])),
            "has 3 hidden states",
        ),
        ("speculators", spoil_safetensors(cut("hidden_states")), "hidden_states\\[0\\] has 3 rows"),
        (
            "speculators",
            spoil_safetensors(lambda c: c.update(hidden_states=c["hidden_states"].flatten(1))),
            "has shape",
        ),
        (
            "speculators-0.4",
            spoil_pickle(lambda c: c["hidden_states"].pop()),
            "has 3 hidden states per token, expected 4",
        ),
        (
            "speculators-0.4",
            spoil_pickle(lambda c: c.update(hidden_states=7)),
            "hidden_states is not a list of tensors",
        ),
        (
            "speculators-0.4",
            spoil_pickle(lambda c: c.update(input_ids=c["input_ids"].float())),
            "input_ids is torch.float32",
        ),
    ],
    indirect=["folder"],
)
def test_a_file_that_is_not_as_it_should_be_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=f"{first_file(folder).name}.*{message}"):
        open_foreign(folder).sample(0)


def in_float8(path, shape=(-1, 1, 1), dtype=torch.float8_e4m3fn):
    """The file as speculators 0.9 writes it in float8; returns what it held before."""
    content = load_file(path)
    hidden = content["hidden_states"].float()
    scales = hidden.abs().amax(dim=(1, 2), keepdim=True) / torch.finfo(dtype).max
    scaled = {"hidden_states": (hidden / scales).to(dtype), "hidden_states_scales": scales.reshape(shape)}
    save_file({name: tensor.contiguous() for name, tensor in (content | scaled).items()}, path)
    return hidden


@pytest.mark.parametrize("folder", ["speculators"], indirect=True)
@pytest.mark.parametrize(
    ("shape", "dtype", "near"),
    [
        ((-1, 1, 1), torch.float8_e4m3fn, 0.05),
        ((-1, 1), torch.float8_e4m3fn, 0.05),
        ((-1, 1, 1), torch.float8_e4m3fnuz, 0.05),
        ((-1, 1, 1), torch.float8_e5m2, 0.1),
    ],
)
def test_rows_in_float8_are_scaled_back(folder, shape, dtype, near):
    hidden = in_float8(first_file(folder), shape, dtype)
    sample = open_foreign(folder).sample(0)
    assert sample is not None
    found = torch.stack([*sample.aux_parts, sample.last], dim=1)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - hidden).norm() / hidden.norm()) < near


def spoil_float8(change):
    def spoil(folder):
        in_float8(first_file(folder))
        spoil_safetensors(change)(folder)

    return spoil


@pytest.mark.parametrize(
    ("folder", "spoil", "message"),
    [
        (
            "speculators",
            spoil_float8(lambda c: c.pop("hidden_states_scales")),
            "float8_e4m3fn without",
        ),
        (
            "speculators",
            spoil_float8(lambda c: c.update(hidden_states=c["hidden_states"].to(torch.bfloat16))),
            "torch.bfloat16 beside hidden_states_scales",
        ),
        ("speculators", spoil_float8(cut("hidden_states_scales")), r"hidden_states_scales is \(3, 1, 1\)"),
        ("speculators", spoil_float8(lambda c: c["hidden_states_scales"].fill_(torch.nan)), "finite factors"),
        (
            "speculators",
            spoil_safetensors(lambda c: c.update(hidden_states_zeros=torch.zeros(20))),
            "holds hidden_states_zeros, which this import does not know",
        ),
        ("specforge", spoil_pickle(lambda c: c.update(pixel_values=torch.zeros(2))), "holds pixel_values"),
        ("specforge", spoil_pickle(lambda c: c.update(aux_hidden_state_scale=2.0)), "aux_hidden_state_scale"),
        ("speculators-0.4", spoil_pickle(lambda c: c.update(scales=torch.ones(20))), "holds scales"),
    ],
    indirect=["folder"],
)
def test_what_is_not_known_or_not_scaled_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=f"{first_file(folder).name}.*{message}"):
        open_foreign(folder).sample(0)


@pytest.mark.parametrize("folder", ["speculators-0.4"], indirect=True)
def test_layers_that_were_chosen_are_read_from_the_files(folder):
    config = folder / "data_config.json"
    config.write_text('{"hidden_states": {"layer_ids": [0, 1, 4, 7]}}')
    assert open_foreign(folder).aux_layers(8) == (1, 2, 5)
    config.write_text('{"hidden_states": {"layer_ids": [0, 1, 4]}}')
    with pytest.raises(
        ValueError,
        match=r"layers \[0, 1, 4\] were captured, but a draft learns from 1 to 8 layers and the last",
    ):
        open_foreign(folder).aux_layers(8)
    config.write_text("[]")
    with pytest.raises(ValueError, match="data_config.json names no hidden_states.layer_ids"):
        open_foreign(folder).aux_layers(8)
    config.unlink()
    assert open_foreign(folder).aux_layers(8) == LATER


@pytest.mark.parametrize("folder", ["speculators"], indirect=True)
def test_a_file_that_is_being_written_is_not_read(folder):
    first_file(folder).with_name("hs_0.safetensors.lock").touch()
    with pytest.raises(ValueError, match="hs_0.safetensors is locked, so it is still being written"):
        open_foreign(folder).sample(0)


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(ValueError, match="--from .*none: there is no such folder"):
        open_foreign(tmp_path / "none")
    with pytest.raises(ValueError, match="neither files of SpecForge .* nor a data set of speculators"):
        open_foreign(tmp_path)
    with pytest.raises(ValueError, match="--hidden-states goes with a data set that speculators prepared"):
        open_foreign(FOREIGN / "specforge", tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        open_foreign(FOREIGN / "speculators", tmp_path / "nowhere")
    for name in ("data_0.ckpt", "data_0.ckpt.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="are the same sample"):
        open_foreign(tmp_path)
