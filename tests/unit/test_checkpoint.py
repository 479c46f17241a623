"""Checkpoints on disk: found whole or named as damaged, readable however they were cut, rotated, never
outside their folder.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eagle3_ds.checkpoint import format as checkpoint_format
from eagle3_ds.checkpoint import fragments
from eagle3_ds.checkpoint.format import (
    KINDS,
    LATEST,
    MANIFEST,
    Fragment,
    Manifest,
    aside_folder,
    damage,
    differing_shapes,
    file_entry,
    folder_name,
    latest,
    newest_intact,
    publish,
    rank_file,
    read_manifest,
    remove_hidden,
    require_intact,
    rotate,
    step_folders,
    write_manifest,
)
from eagle3_ds.checkpoint.fragments import FragmentReader, as_bytes, from_bytes, pieces_in
from eagle3_ds.checkpoint.rng import random_states, restore_random_states
from eagle3_ds.train.metrics import MetricsFile

SHAPES = {"fc.weight": (3, 5), "norm.weight": (4,)}


def whole_state() -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.randn(torch.Size(shape).numel(), generator=generator)
        for kind in KINDS
        for name, shape in SHAPES.items()
    }


def write_rank_files(folder: Path, count: int) -> None:
    """The state cut `count` times, one file each."""
    for rank in range(count):
        tensors = {}
        for (kind, name), flat in whole_state().items():
            fragment = Fragment(name, 0, 0, len(flat)).share(rank, count)
            if fragment.numel:
                tensors[fragment.key(kind)] = fragment.of(flat).clone()
        save_file(tensors, folder / rank_file(rank))


def write_checkpoint(
    root: Path,
    step: int,
    ranks: int = 2,
    heldout: float | None = None,
    accepted: float | None = None,
    decoded: float | None = None,
) -> Path:
    aside = aside_folder(root, step)
    aside.mkdir(parents=True)
    write_rank_files(aside, ranks)
    files = {path.name: file_entry(path) for path in aside.iterdir()}
    manifest = Manifest(
        step=step,
        packs=4 * step,
        adam_steps=step,
        skipped_steps=0,
        heldout_loss=heldout,
        heldout_acceptance=accepted,
        heldout_decoded=decoded,
        recipe={"output_dir": "out"},
        mesh={"draft_dp": 1},
        parameters=SHAPES,
        versions={},
        files=files,
    )
    write_manifest(aside, manifest)
    folder = root / folder_name(step)
    publish(aside, folder, step)
    return folder


def reader_of(folder: Path) -> FragmentReader:
    """Of pieces that have travelled between ranks, padded as there."""
    manifest = read_manifest(folder)
    pieces = [
        piece
        for name in sorted(manifest.files, reverse=True)
        for piece in from_bytes(as_bytes(pieces_in(folder, [name])).ljust(2000))
    ]
    return FragmentReader(folder, manifest, pieces)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7, heldout=1.25)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.packs, manifest.heldout_loss, manifest.parameters) == (
        7,
        28,
        1.25,
        SHAPES,
    )
    assert damage(folder, manifest) is None
    assert latest(tmp_path) == require_intact(tmp_path) == folder
    assert newest_intact(tmp_path) == (folder, [])
    assert names(tmp_path) == [LATEST, "step-000007"]
    assert differing_shapes(manifest, SHAPES) == []
    assert differing_shapes(manifest, {"fc.weight": (3, 5), "norm.weight": [8]}) == [
        "norm.weight [4] instead of [8]"
    ]


@pytest.mark.parametrize("written_by", [1, 2, 3, 7])
@pytest.mark.parametrize("read_by", [1, 2, 5])
def test_any_cut_is_read_by_any_other(tmp_path: Path, written_by: int, read_by: int) -> None:
    folder = write_checkpoint(tmp_path, 1, written_by)
    with reader_of(folder) as reader:
        for (kind, name), flat in whole_state().items():
            cuts = [Fragment(name, 0, 0, len(flat)).share(index, read_by) for index in range(read_by)]
            assert torch.equal(torch.cat([reader.read(kind, cut) for cut in cuts]), flat)


def test_a_rank_opens_only_the_files_that_hold_its_own_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 15 ranks wrote one element of the large parameter; elements 3 to 5 lie in three files."""
    folder = write_checkpoint(tmp_path, 1, ranks=15)
    opened: list[str] = []
    whole = fragments.safe_open

    def counted(path: Path, **settings: str) -> object:
        opened.append(path.name)
        return whole(path, **settings)

    monkeypatch.setattr(fragments, "safe_open", counted)
    with reader_of(folder) as reader:
        assert sorted(opened) == [rank_file(rank) for rank in range(15)]
        opened.clear()
        for kind in KINDS:
            read = reader.read(kind, Fragment("fc.weight", 3, 100, 3))
            assert torch.equal(read, whole_state()[kind, "fc.weight"][3:6])
            assert len(reader.read(kind, Fragment("fc.weight", 15, 0, 0))) == 0
    assert opened == [rank_file(3), rank_file(4), rank_file(5)]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_truncate, "bytes instead of"),
        (_flip, "has been altered"),
        (Path.unlink, "is missing"),
        (_link, "is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_newest_intact_checkpoint_offered(
    tmp_path: Path, harm, words: str
) -> None:
    whole, broken = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    harm(broken / rank_file(1))
    problem = damage(broken, read_manifest(broken))
    assert problem is not None and rank_file(1) in problem and words in problem
    assert damage(broken, read_manifest(broken), [rank_file(0)]) is None
    assert newest_intact(tmp_path) == (whole, [problem])
    with pytest.raises(
        ValueError, match=f"{rank_file(1)} .*step-000004 is the newest intact one; `--resume auto` takes it"
    ):
        require_intact(tmp_path)
    harm(whole / rank_file(0))
    found, problems = newest_intact(tmp_path)
    assert found is None and len(problems) == 2
    with pytest.raises(ValueError, match="No other checkpoint is intact"):
        require_intact(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    whole, broken = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    path = broken / MANIFEST
    text = path.read_text()
    for harmed, words in [
        (text.replace('"packs": 32', '"packs": 33'), "its own sha256 does not fit"),
        (text[:-5], "Invalid JSON"),
        ("[]", "Input should be an object"),
        ("\x00\xff", "is damaged or of another format"),
    ]:
        path.write_text(harmed)
        with pytest.raises(ValueError, match=words) as caught:
            read_manifest(broken)
        assert str(path) in str(caught.value)
        assert newest_intact(tmp_path) == (whole, [str(caught.value)])
    path.unlink()
    with pytest.raises(
        ValueError, match=r"manifest.json is missing or damaged.*step-000004 is the newest intact one"
    ):
        require_intact(tmp_path)


def rewrite(folder: Path, **changes: object) -> None:
    """Change a manifest and seal it again, as somebody who means harm would."""
    content = {**json.loads((folder / MANIFEST).read_text())["manifest"], **changes}
    (folder / MANIFEST).write_text(
        json.dumps({"sha256": checkpoint_format._digest(content), "manifest": content})
    )


def test_a_checkpoint_of_before_skipped_steps_in_a_row_were_counted_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    content = json.loads((folder / MANIFEST).read_text())["manifest"]
    assert content.pop("skipped_in_a_row") == 0
    (folder / MANIFEST).write_text(
        json.dumps({"sha256": checkpoint_format._digest(content), "manifest": content})
    )
    assert read_manifest(folder).skipped_in_a_row == 0


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", ".hidden", "", "a\\b\n"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 1)
    rewrite(folder, files={name: {"bytes": 0, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match="files"):
        read_manifest(folder)


def test_latest_names_a_checkpoint_or_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    (tmp_path / LATEST).write_text('{"folder": "../step-000001", "step": 1}')
    with pytest.raises(ValueError, match=r"latest.json is damaged.*--resume auto"):
        latest(tmp_path)
    assert newest_intact(tmp_path)[0] == tmp_path / "step-000001"
    (tmp_path / LATEST).unlink()
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("master/fc.weight/7", "master of fc.weight has a gap or an overlap at element 7"),
        ("exp_avg/norm.weight/2", "exp_avg of norm.weight"),
    ],
)
def test_a_gap_is_found_before_anything_is_read(tmp_path: Path, key: str, words: str) -> None:
    folder = write_checkpoint(tmp_path, 1, ranks=2)
    kind, name, start = key.split("/")
    tensors = checkpoint_format.read_prefix(folder / rank_file(1), "")
    save_file(
        {f"{kind}/{name}/{int(start) + 1}" if k == key else k: v for k, v in tensors.items()},
        folder / rank_file(1),
    )
    with pytest.raises(ValueError, match=words):
        reader_of(folder)
    save_file({k: v for k, v in tensors.items() if k != key}, folder / rank_file(1))
    with pytest.raises(ValueError, match=f"{kind} of {name} has {start} elements instead of"):
        reader_of(folder)


def test_a_file_that_is_none_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    save_file({"master/fc.weight/first": torch.zeros(3)}, folder / rank_file(0))
    (folder / rank_file(1)).write_bytes(b"no tensors")
    for rank in range(2):
        with pytest.raises(ValueError, match=f"{rank_file(rank)} is not a file of a checkpoint"):
            pieces_in(folder, [rank_file(rank)])
    assert pieces_in(folder, [MANIFEST, "vocabulary.safetensors"]) == []


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)):
        newest = write_checkpoint(tmp_path, step, heldout=loss)
        rotate(tmp_path, newest, keep=2)
    assert names(tmp_path) == [LATEST, "step-000002", "step-000004", "step-000005"]
    rotate(tmp_path, newest, keep=None)
    assert len(step_folders(tmp_path)) == 3
    # Resumed from step 4, because 5 was damaged.
    (tmp_path / "step-000005" / MANIFEST).unlink()
    rotate(tmp_path, tmp_path / "step-000004", keep=1)
    assert names(tmp_path) == [LATEST, "step-000002", "step-000004"]


def test_the_best_may_be_the_one_that_is_accepted_longest(tmp_path: Path) -> None:
    for step, loss, accepted in ((1, 1.0, 1.5), (2, 2.0, 2.5), (3, 3.0, None), (4, 4.0, 2.0)):
        newest = write_checkpoint(tmp_path, step, heldout=loss, accepted=accepted)
        rotate(tmp_path, newest, 1, "acceptance_length")
    assert names(tmp_path) == [LATEST, "step-000002", "step-000004"]


def test_the_best_may_be_the_one_that_decodes_best(tmp_path: Path) -> None:
    for step, accepted, decoded in ((1, 3.0, 1.5), (2, 2.0, 2.5), (3, 9.0, None), (4, 1.0, 2.0)):
        newest = write_checkpoint(tmp_path, step, accepted=accepted, decoded=decoded)
        rotate(tmp_path, newest, 1, "acceptance_length_decoded")
    assert names(tmp_path) == [LATEST, "step-000002", "step-000004"]


def test_a_checkpoint_replaces_a_damaged_one_of_its_name(tmp_path: Path) -> None:
    _truncate(write_checkpoint(tmp_path, 3) / rank_file(0))
    assert newest_intact(tmp_path)[0] is None
    folder = write_checkpoint(tmp_path, 3)
    assert newest_intact(tmp_path) == (folder, [])
    remove_hidden(tmp_path)
    assert names(tmp_path) == [LATEST, "step-000003"]


@pytest.mark.parametrize("operation", ["os.rename", "os.replace", "os.fsync"])
def test_wherever_publishing_stops_a_whole_checkpoint_is_there(
    tmp_path: Path, operation: str, monkeypatch
) -> None:
    """The n-th call of each system call fails, for every n: what --resume and --resume auto find is whole all
    the same.
    """
    real = getattr(os, operation.partition(".")[2])
    for allowed in range(8):
        root = tmp_path / str(allowed)
        write_checkpoint(root, 1)
        calls = iter(range(100))

        def stop(*args, calls=calls, allowed=allowed):
            if next(calls) >= allowed:
                raise OSError("stopped here")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(operation, stop)
            try:
                write_checkpoint(root, 2)
                finished = True
            except OSError:
                finished = False
        expected = {"step-000002"} if finished else {"step-000001", "step-000002"}
        assert require_intact(root).name in expected
        found, problems = newest_intact(root)
        assert found is not None and found.name in expected and not problems
    assert finished


def test_random_states_come_back() -> None:
    random.gauss(0, 1), np.random.randn()
    states = random_states(torch.device("cpu"))
    expected = [
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
        torch.rand(3).tolist(),
    ]
    restore_random_states(states, torch.device("cpu"))
    assert [
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
        torch.rand(3).tolist(),
    ] == expected


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step}, durably=step == 2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsFile(path, 2).write({"step": 3, "again": True}, durably=False)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no step's metrics: 'rubbish'"):
        MetricsFile(path, 2)
