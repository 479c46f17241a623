"""A checkpoint on disk: the fp32 masters and Adam moments of all parameters, cut into fragments that a run on
any other mesh, ZeRO stage or zero_group can read.

    checkpoints/latest.json             {"folder": "step-000120", "step": 120}, written last
    checkpoints/step-000120/
        rank-00000.safetensors ...      fragments `KIND/PARAMETER/START`, fp32 [numel], and that rank's
                                        random states `rng/...`
        vocabulary.safetensors          the draft vocabulary: d2t, t2d
        manifest.json                   steps, recipe and shapes; size and sha256 of every other file

For example `exp_avg/fc.weight/4096` holds the first Adam moment of `fc.weight` from its flattened element
4096 on. A folder is written under a hidden name, synced to disk and then renamed: one that is called
`step-...` was complete when it got its name. This module uses neither torch.distributed nor DeepSpeed, so
that the command line can check a checkpoint before any rank starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from eagle3_ds.config import BestBy

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
CHECKPOINTS = "checkpoints"
# The draft's weights before the first and after the last step, next to the checkpoints. The second file
# exists only when the run came to its end.
INITIAL_WEIGHTS, FINAL_WEIGHTS = "draft-initial.safetensors", "draft-final.safetensors"
LATEST, MANIFEST, VOCABULARY = "latest.json", "manifest.json", "vocabulary.safetensors"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")

# A plain name without separators or a leading dot: a manifest cannot name a file outside its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$")]
Count = Annotated[int, Field(ge=0)]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are untouched."""


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter: elements [start, start + numel) of the flattened
    parameter `name`, which lie from element `offset` on in the flattened master that holds them.
    """

    name: str
    start: int
    offset: int
    numel: int

    def share(self, index: int, count: int) -> Fragment:
        """The `index`-th of `count` nearly equal cuts of this fragment."""
        first, last = (self.numel * end // count for end in (index, index + 1))
        return Fragment(self.name, self.start + first, self.offset + first, last - first)

    def of(self, flat: Tensor) -> Tensor:
        """This fragment's elements in a flattened master or moment [n]: a view [numel]."""
        return flat.narrow(0, self.offset, self.numel)

    def key(self, kind: str) -> str:
        """The tensor's name in a checkpoint file, for example `master/fc.weight/0`."""
        return f"{kind}/{self.name}/{self.start}"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """A file of a checkpoint: its size, and its sha256 in hexadecimal."""

    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Strict):
    """What a run needs to know of a checkpoint besides its tensors.

    Attributes:
        step: optimizer steps done, skipped ones included; the learning rate depends on it.
        packs: packed sequences trained on, over all draft_dp ranks: the loader's position.
        adam_steps: updates that AdamW made, skipped steps not included.
        skipped_steps: DeepSpeed's count of skipped steps.
        skipped_in_a_row: how many steps in a row, ending with this one, were skipped as not finite.
        heldout_loss, heldout_acceptance: loss and simulated acceptance length on the held-out packs; null
            when they were not evaluated at this step.
        heldout_decoded: acceptance length of held-out prompts that were decoded; null without `eval.during`.
        recipe: the resolved recipe, as JSON.
        mesh: draft_dp, ring, ulysses and ZeRO stage of the run that wrote it. For people: no code reads it.
        parameters: whole shapes, by the draft's parameter names.
        versions: versions of the packages that wrote it, for people.
        files: all files but the manifest itself.
    """

    format: Literal[1] = 1
    step: Count
    packs: Count
    adam_steps: Count
    skipped_steps: Count
    # Has a default because checkpoints of earlier versions lack it.
    skipped_in_a_row: Count = 0
    heldout_loss: float | None
    heldout_acceptance: float | None = None
    heldout_decoded: float | None = None
    recipe: dict[str, Any]
    mesh: dict[str, int]
    parameters: dict[str, tuple[Count, ...]]
    versions: dict[str, str]
    files: dict[FileName, FileEntry]


class _Sealed(_Strict):
    """The content of manifest.json. `sha256` is the digest of `manifest` as JSON with sorted keys, by which a
    changed digit in the manifest itself is noticed.
    """

    sha256: str
    manifest: dict[str, Any]


class _Latest(_Strict):
    folder: Annotated[str, Field(pattern="^" + _STEP_FOLDER.pattern + "$")]
    step: Count


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.model_dump(mode="json")
    write_durably(
        folder / MANIFEST, json.dumps({"sha256": _digest(content), "manifest": content}, indent=1) + "\n"
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        ValueError: the file is missing, was altered, or has another format.
    """
    path = folder / MANIFEST
    try:
        sealed = _Sealed.model_validate_json(path.read_bytes())
        if sealed.sha256 != _digest(sealed.manifest):
            raise ValueError("its own sha256 does not fit its content")
        return Manifest.model_validate_json(json.dumps(sealed.manifest))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is damaged or of another format: {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
        return FileEntry(bytes=file.tell(), sha256=digest.hexdigest())


def damage(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    All sizes are checked before the first digest: that finds a missing or short file without reading any.

    Args:
        names: the files to check; None checks all.
    """
    entries = {name: entry for name, entry in manifest.files.items() if names is None or name in names}
    for name, entry in entries.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {entry.bytes}"
    for name, entry in entries.items():
        if file_entry(folder / name) != entry:
            return f"{folder / name} has been altered: its sha256 is not the manifest's"
    return None


def step_folders(root: Path) -> list[Path]:
    """The folders of all checkpoints in `root`, newest first. They may have been damaged since."""
    found = [
        (int(match[1]), path) for path in root.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_intact(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files all have the sizes and digests of its manifest (None without one),
    and what is wrong with each newer one.
    """
    problems: list[str] = []
    for folder in step_folders(root):
        try:
            problem = damage(folder, read_manifest(folder))
        except ValueError as error:
            problem = str(error)
        if problem is None:
            return folder, problems
        problems.append(problem)
    return None, problems


def latest(root: Path) -> Path:
    """The folder that latest.json names.

    Raises:
        ValueError: latest.json is missing or damaged.
    """
    path = root / LATEST
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist, so there is no checkpoint to go on from. Start the run without --resume."
        )
    try:
        return root / _Latest.model_validate_json(path.read_bytes()).folder
    except ValidationError as error:
        raise ValueError(
            f"{path} is damaged: {error.errors()[0]['msg']}. `--resume auto` does not need it."
        ) from error


def require_intact(root: Path) -> Path:
    """The newest checkpoint, with all its files checked.

    Raises:
        ValueError: it is damaged. The message says how, and names the newest intact checkpoint.
    """
    folder = latest(root)
    try:
        problem = damage(folder, read_manifest(folder))
    except ValueError as error:
        problem = str(error)
    if problem is None:
        return folder
    other, _ = newest_intact(root)
    offer = (
        f"{other} is the newest intact one; `--resume auto` takes it"
        if other
        else "No other checkpoint is intact"
    )
    raise ValueError(f"The newest checkpoint is damaged: {problem}. {offer}.")


def publish(aside: Path, folder: Path, step: int) -> None:
    """Rename the finished folder `aside` to `folder`, then write latest.json. An existing `folder`, left by a
    run that was resumed from before it, is hidden first.
    """
    root = folder.parent
    sync_folder(aside)
    if folder.exists():
        hide(folder)
    os.rename(aside, folder)
    sync_folder(root)
    write_durably(root / LATEST, json.dumps({"folder": folder.name, "step": step}) + "\n")


def rotate(root: Path, newest: Path, keep: int | None, best_by: BestBy = "heldout_loss") -> None:
    """Remove old checkpoints: keep `newest`, the `keep - 1` before it, and the best one by `best_by`. With
    `keep` None, none before `newest` is removed.

    Folders newer than `newest` are removed too: they were damaged, and the run was resumed from before them.
    """
    folders = step_folders(root)
    own = folders[folders.index(newest) :]
    scored = (pair for folder in own if (pair := _heldout(folder, best_by)))
    best = min(scored, default=None, key=lambda pair: pair[0])
    kept = {*own[:keep], best[1] if best else newest}
    for folder in folders:
        if folder not in kept:
            hide(folder)
    remove_hidden(root)


def _heldout(folder: Path, best_by: BestBy) -> tuple[float, Path] | None:
    """(score, folder), a lower score being better; None for a checkpoint without an evaluation."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        # A damaged checkpoint is not the best one. Resuming reports the damage.
        return None
    if best_by == "heldout_loss":
        return None if manifest.heldout_loss is None else (manifest.heldout_loss, folder)
    decoded = best_by == "acceptance_length_decoded"
    accepted = manifest.heldout_decoded if decoded else manifest.heldout_acceptance
    return None if accepted is None else (-accepted, folder)


def hide(folder: Path) -> None:
    """Rename a checkpoint to a hidden name, in one step. If its removal is then interrupted, no folder called
    `step-...` is left with files missing.
    """
    os.rename(folder, folder.with_name(f".{folder.name}.{os.getpid()}.old"))


def remove_hidden(root: Path) -> None:
    """Remove the hidden folders that `hide`, or a write that was interrupted, left."""
    for path in root.glob(".step-*"):
        shutil.rmtree(path)


def aside_folder(root: Path, step: int) -> Path:
    """The hidden folder that a checkpoint is written to before it is renamed."""
    return root / f".{folder_name(step)}.new"


def write_durably(path: Path, text: str) -> None:
    """Write a small file under a hidden name, sync it and rename it: readers see the old content or the new
    one, also after a power cut.
    """
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync_file(aside)
    os.replace(aside, path)
    sync_folder(path.parent)


def let_others_read(path: Path) -> None:
    """Give a file the mode of any new file: safetensors leaves its own to their owner, whatever the umask."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_prefix(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with `prefix`, whole, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def differing_shapes(manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """One text for each parameter that only one of checkpoint and model has, or that has another shape."""
    saved = {name: list(shape) for name, shape in manifest.parameters.items()}
    wanted = {name: list(shape) for name, shape in shapes.items()}
    return [
        f"{name} {saved.get(name, 'absent')} instead of {wanted.get(name, 'absent')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
