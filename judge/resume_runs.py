"""Small real runs on gloo ranks: trained to the end, killed on the way, resumed, resumed in another shape.

Everything is real but the size: a target on disk, prepared data with captured hidden states, packing, and the
very function that the launcher's ranks run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from eagle3_ds.checkpoint.format import CHECKPOINTS, FINAL_WEIGHTS, folder_name, newest_intact
from eagle3_ds.checkpoint.restore import load_checkpoint
from eagle3_ds.checkpoint.saver import CheckpointSaver, Progress
from eagle3_ds.config import Recipe, TargetBuild, TargetSection
from eagle3_ds.guard.heart import Heart
from eagle3_ds.guard.stop import StopRequest
from eagle3_ds.run.stages import prepare
from eagle3_ds.targets import build_target
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train import loop
from eagle3_ds.train.main import build_loaders, build_trainer, open_states, train
from eagle3_ds.train.state import EngineState
from judge.ranks import run_ranks

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
STEPS = 4
# Taken for the time of a step where none has been seen.
FIRST_STEP_SECONDS = 0.2
BUILD = TargetBuild(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=7, num_heads=4, num_kv_heads=2,
    max_positions=512, sequence_length=32, batch_size=4, steps=0,
)  # fmt: skip
CONVERSATIONS = [
    [
        {"role": "user", "content": f"What is f{n}?"},
        {"role": "assistant", "content": f"It adds {n} to x. " * (1 + n % 4)},
    ]
    for n in range(40)
]


@dataclass(frozen=True)
class Shape:
    """How the ranks share a run. The product draft_dp x accumulation is 4 for all, so that their steps see
    the same packs.
    """

    draft_dp: int
    ring: int
    ulysses: int
    accumulation: int
    deepspeed: str
    zero_group: str

    @property
    def world_size(self) -> int:
        return self.draft_dp * self.ring * self.ulysses


SHAPES = {
    "zero0": Shape(1, 1, 2, 4, "zero0", "all"),
    "zero1": Shape(2, 1, 2, 2, "zero1", "draft_dp"),
    "zero2": Shape(2, 2, 1, 2, "zero2", "all"),
    "zero3": Shape(1, 2, 1, 4, "zero3", "all"),
}


def prepare_inputs(folder: Path) -> None:
    """Target, documents and hidden states, which all runs share. `folder / "prepared"` is the start of an
    output folder.
    """
    texts = [f"def f{n}(x):\n    return x + {n}\n" * 4 for n in range(30)]
    build_target(
        TargetSection(path=str(folder / "target"), build=BUILD), texts, CONVERSATIONS, progress=False
    )
    lines = (json.dumps({"messages": messages}) for messages in CONVERSATIONS)
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "prepared").mkdir()
    prepare(make_recipe(folder, "zero0", folder / "prepared"))


def make_recipe(inputs: Path, shape: str | Shape, output: Path, **train_keys: Any) -> Recipe:
    """The recipe of a run of `STEPS` optimizer steps; `shape` is one of SHAPES by name, or another one."""
    how = SHAPES[shape] if isinstance(shape, str) else shape
    sections: dict[str, dict[str, Any]] = {
        "target": {"path": str(inputs / "target"), "dtype": "float32"},
        "draft": {"vocab_size": 192, "ttt_steps": 2},
        "data": {
            "train": (str(inputs / "data.jsonl"),),
            "max_length": 128,
            "heldout_fraction": 0.1,
            "hidden_dtype": "float32",
        },
        "parallel": {
            "draft_dp": how.draft_dp,
            "ring": how.ring,
            "ulysses": how.ulysses,
            "zero_group": how.zero_group,
        },
        "train": {
            "steps": STEPS,
            "accumulation": how.accumulation,
            "dtype": "float32",
            "learning_rate": 3e-3,
            "warmup_steps": 2,
        },
        "eval": {"num_prompts": 0},
    }
    sections["data"]["cache_dir"] = str(inputs / "cache")
    sections["parallel"]["chunks_per_rank"] = 2
    sections["train"] |= {"weight_decay": 0.1, "eval_every": 2, "save_every": 1, **train_keys}
    deepspeed = str(DS_CONFIGS / f"{how.deepspeed}.json")
    return Recipe.model_validate({**sections, "deepspeed": deepspeed, "output_dir": str(output)})


def start_output(inputs: Path, output: Path) -> None:
    """An output folder as the prepare stage leaves it."""
    shutil.copytree(inputs / "prepared", output)


def run(recipe: Recipe, world_size: int) -> None:
    """Train on fresh ranks from the newest intact checkpoint, or from the start when there is none."""
    found, _ = newest_intact(Path(recipe.output_dir) / CHECKPOINTS)
    run_ranks(world_size, _train, recipe, found.name if found else None)


def _train(recipe: Recipe, resume: str | None) -> None:
    train(recipe, resume, Heart(None))


@dataclass(frozen=True)
class Blow:
    """A rank (None: all of them at once) gets a signal in optimizer step `step` (from 0), or in the saving
    after it.

    `moment` says when, as a share of the time from one step's beginning to the next.
    """

    step: int
    moment: float
    rank: int | None
    number: signal.Signals = signal.SIGKILL


def run_until_death(recipe: Recipe, world_size: int, blow: Blow) -> bool:
    """As `run`, but killed; False when the run ended before."""
    struck = Path(recipe.output_dir) / "struck"
    struck.unlink(missing_ok=True)
    try:
        run_struck(recipe, world_size, blow)
    except RuntimeError:
        # From the rank itself, or from one that lost it.
        if not struck.exists():
            raise
    return struck.exists()


def run_struck(recipe: Recipe, world_size: int, blow: Blow) -> None:
    """As `run`, under a blow."""
    found, _ = newest_intact(Path(recipe.output_dir) / CHECKPOINTS)
    run_ranks(world_size, _train_under, recipe, found.name if found else None, blow)


def _train_under(recipe: Recipe, resume: str | None, blow: Blow) -> None:
    rate_at, began = loop.learning_rate_at, list[float]()

    def strike() -> None:
        (Path(recipe.output_dir) / "struck").touch()
        os.kill(os.getpid(), blow.number)

    def rate_under(recipe: Recipe, step: int, total_steps: int) -> float:
        began.append(time.monotonic())
        if step == blow.step and blow.rank in (None, int(os.environ["RANK"])):
            took = began[-1] - began[-2] if len(began) > 1 else FIRST_STEP_SECONDS
            threading.Timer(blow.moment * took, strike).start()
        return rate_at(recipe, step, total_steps)

    # What the loop asks for first in every step; this process was made for one run.
    with mock.patch.object(loop, "learning_rate_at", rate_under):
        _train(recipe, resume)


def continue_from(recipe: Recipe, checkpoints: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """On every rank: put one trainer to each checkpoint in turn and train to the end. Metrics by the
    checkpoint's name.
    """
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    trainer = build_trainer(recipe, topology)
    metrics = {}
    for name, folder in checkpoints.items():
        output = Path(recipe.output_dir) / name
        output.mkdir(exist_ok=True)
        resumed = load_checkpoint(EngineState(trainer), folder)
        loader, heldout = build_loaders(
            recipe, topology, open_states(recipe, topology), (resumed.step, resumed.packs)
        )
        loop.run_training(trainer, loader, heldout, output, StopRequest(), Heart(None), resumed)
        metrics[name] = read_metrics(output) if topology.place.rank == 0 else []
    return metrics


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def restored_in_place(recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """On every rank: reports of two steps after a checkpoint, and again after the trainer went back to it."""
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    trainer = build_trainer(recipe, topology)
    loader, _ = build_loaders(recipe, topology, open_states(recipe, topology))
    root = Path(recipe.output_dir) / CHECKPOINTS
    saver = CheckpointSaver(EngineState(trainer), root)
    trainer.step(loader.step(0))
    saver.save(Progress(1, loader.packs_before(1)))
    # With `train.save_async` the checkpoint is written while these are trained.
    before = [trainer.step(loader.step(index)) for index in (1, 2)]
    saver.finish()
    load_checkpoint(EngineState(trainer), root / folder_name(1))
    return before, [trainer.step(loader.step(index)) for index in (1, 2)]


def differences(output: Path, reference: Path) -> list[str]:
    """Where a run is not bitwise the reference."""
    found = []
    for name in ("step", "lr", "loss", "step_loss", "step_accuracy", "tau", "grad_norm", "tokens", "heldout"):
        values, expected = (
            [record.get(name) for record in read_metrics(folder)] for folder in (output, reference)
        )
        if values != expected:
            found.append(f"{name} {values} instead of {expected}")
    weights, wanted = (load_file(folder / FINAL_WEIGHTS) for folder in (output, reference))
    found += [
        f"weight {name}"
        for name in wanted
        if name not in weights or not torch.equal(weights[name], wanted[name])
    ]
    return found
