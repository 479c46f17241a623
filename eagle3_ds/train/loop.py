"""The training loop: steps, held-out evaluation, checkpoints, metrics."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from eagle3_ds.config import Recipe
from eagle3_ds.layout import PackedSequence
from eagle3_ds.train.divergence import DivergenceGuard
from eagle3_ds.train.heart import Heart
from eagle3_ds.train.metrics import MetricsFile, peak_memory_bytes
from eagle3_ds.train.replicas import require_same_replicas
from eagle3_ds.train.trainer import DraftTrainer, learning_rate_at


class Loader(Protocol):
    """What the loop needs of the data: a pure function of the step, and an epoch's length."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, index: int) -> list[PackedSequence]: ...

    def documents(self, index: int) -> list[int]: ...

    def pack_indices(self, index: int) -> list[int]: ...


def total_steps(recipe: Recipe, loader: Loader) -> int:
    """Optimizer steps of the whole run."""
    return recipe.train.steps or loader.steps_per_epoch * (recipe.train.epochs or 1)


def run_training(
    trainer: DraftTrainer, loader: Loader, heldout: Sequence[PackedSequence], output_dir: Path, resume: bool, heart: Heart
) -> None:
    """Train to the end. Collective.

    `heldout` holds the packs of this draft_dp rank, equally many on every rank. Files are written by rank 0 alone, but for
    checkpoints.
    """
    recipe, is_first = trainer.recipe, trainer.topology.place.rank == 0
    last = total_steps(recipe, loader)
    done = _resume(trainer, output_dir) if resume else 0
    metrics = MetricsFile(output_dir / "metrics.jsonl", done) if is_first else None
    progress = tqdm(total=last, initial=done, desc="training", unit="step", disable=not is_first)
    require_same_replicas(trainer, loader, done)
    guard = DivergenceGuard(trainer, loader, output_dir, recipe.faults.max_skipped)
    for index in range(done, last):
        heart.at("training", index)
        rate = learning_rate_at(recipe, index, last)
        started = time.perf_counter()
        report = trainer.step(loader.step(index), rate)
        seconds = time.perf_counter() - started
        skipped = guard.skipped(index, report)
        record: dict[str, Any] = {"step": index + 1, "lr": rate, **report.as_dict()}
        if skipped:
            record["skipped"] = True
        record["tokens_per_s"] = report.tokens / seconds
        record["peak_memory_bytes"] = peak_memory_bytes(trainer.topology.device)
        if heldout and _due(index + 1, recipe.train.eval_every, last):
            heart.at("evaluating", index + 1)
            record["heldout"] = trainer.evaluate(heldout).as_dict()
        if metrics is not None:
            metrics.write(record)
        save_now = _due(index + 1, recipe.train.save_every, last)
        if save_now or _due(index + 1, recipe.faults.check_every, last):
            require_same_replicas(trainer, loader, index + 1)
        if save_now:
            heart.at("saving", index + 1)
            _save(trainer, output_dir, index + 1)
        progress.set_postfix(loss=f"{report.loss:.3f}", tau=f"{report.tau:.2f}", refresh=False)
        progress.update()
    progress.close()
    save_weights(trainer, output_dir / "draft-final.safetensors")


def save_weights(trainer: DraftTrainer, path: Path) -> None:
    """The draft's weights whole, in one file by rank 0. Collective."""
    weights = trainer.state_dict()
    if trainer.topology.place.rank == 0:
        aside = path.with_name(f".{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(aside))
        os.replace(aside, path)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _save(trainer: DraftTrainer, output_dir: Path, step: int) -> None:
    """A checkpoint counts once `latest.json` names it; that file is replaced last and whole."""
    name = f"step-{step:06d}"
    trainer.save(output_dir / "checkpoints" / name, {"step": step})
    if dist.is_initialized():
        dist.barrier()
    if trainer.topology.place.rank == 0:
        latest = output_dir / "checkpoints" / "latest.json"
        aside = latest.with_name(".latest.json")
        aside.write_text(json.dumps({"folder": name, "step": step}) + "\n")
        os.replace(aside, latest)


def _resume(trainer: DraftTrainer, output_dir: Path) -> int:
    latest = output_dir / "checkpoints" / "latest.json"
    if not latest.is_file():
        raise ValueError(f"--resume: {latest} does not exist, so there is no checkpoint to go on from. Start without it.")
    folder = json.loads(latest.read_text())["folder"]
    return int(trainer.load(latest.parent / folder)["step"])
