"""The training loop: steps, held-out evaluation, checkpoints, metrics."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from eagle3_ds.checkpoint.format import CHECKPOINTS, FINAL_WEIGHTS, Manifest, folder_name, let_others_read
from eagle3_ds.checkpoint.saver import WRITING, CheckpointSaver, Progress
from eagle3_ds.collectives.agreement import max_over_ranks
from eagle3_ds.config import Recipe
from eagle3_ds.guard.divergence import DivergenceGuard
from eagle3_ds.guard.heart import Heart
from eagle3_ds.guard.replicas import require_same_replicas, weights_compared_before_update
from eagle3_ds.guard.stop import REASONS, StopRequest
from eagle3_ds.launch.state import Steps, write_steps
from eagle3_ds.layout import PackedSequence
from eagle3_ds.parts import DATA, marked
from eagle3_ds.say import progress_bar
from eagle3_ds.train.decoded import DecodedAcceptance
from eagle3_ds.train.metrics import MetricsFile, peak_memory_bytes
from eagle3_ds.train.profile import StepProfile, check_profile, profiled_step
from eagle3_ds.train.state import EngineState
from eagle3_ds.train.tracking import Tracking
from eagle3_ds.train.trainer import DraftTrainer, learning_rate_at

logger = logging.getLogger(__name__)
DECODED = "acceptance_length_decoded"
"""Key of a decoding's acceptance length in metrics.jsonl."""


class StepSource(Protocol):
    """What the loop needs of the data. All methods are pure functions, so that a resumed run sees the same
    packs.
    """

    def steps_in(self, epochs: int) -> int: ...

    def packs_before(self, step: int) -> int: ...

    def step(self, index: int) -> list[PackedSequence]: ...

    def documents(self, step: int) -> list[int]: ...

    def document(self, step: int, place: int) -> PackedSequence: ...

    def pack_indices(self, index: int) -> list[int]: ...


def total_steps(recipe: Recipe, loader: StepSource) -> int:
    """Optimizer steps of the whole run."""
    return recipe.train.steps or loader.steps_in(recipe.train.epochs or 1)


def run_training(
    trainer: DraftTrainer,
    loader: StepSource,
    heldout: Sequence[PackedSequence],
    output_dir: Path,
    stop: StopRequest,
    heart: Heart,
    resumed: Manifest | None = None,
    decoded: DecodedAcceptance | None = None,
    tracking: Tracking | None = None,
) -> None:
    """Train to the end of the run, or until a request to stop. Collective.

    At the end rank 0 writes the final weights; after a request to stop, all ranks write a checkpoint.

    Args:
        heldout: held-out packs of this draft_dp rank, equally many on every rank.
        stop: the requests to stop that this rank has received.
        heart: reports to the supervisor what this rank does.
        resumed: manifest of the checkpoint that was loaded into the trainer; None for a new run.
        decoded: what is decoded every `eval.during` steps and after the last; None decodes nothing.
        tracking: rank 0's trackers, which it opens; who made it closes them.

    Raises:
        ValueError: the checkpoint has done more steps than the run has.
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: too many steps in a row were not finite.
        RuntimeError: ranks that must hold equal tensors hold different ones.
    """
    recipe, is_first = trainer.recipe, trainer.topology.place.rank == 0
    last, done = total_steps(recipe, loader), resumed.step if resumed else 0
    if done > last:
        raise ValueError(
            f"The checkpoint is of step {done}, the run ends after step {last}. Raise train.steps or "
            "train.epochs."
        )
    check_profile(recipe, done, last)
    profile = StepProfile.of(trainer, output_dir)
    metrics = MetricsFile(output_dir / "metrics.jsonl", done, tracking) if is_first else None
    if is_first:
        # Final weights of an earlier, shorter run: while this one has not ended, they must not look like its.
        (output_dir / FINAL_WEIGHTS).unlink(missing_ok=True)
        write_steps(output_dir, Steps(done, last))
    saver = CheckpointSaver(EngineState(trainer), output_dir / CHECKPOINTS)
    saved, reason = resumed.step if resumed else None, ""
    progress = progress_bar(total=last, initial=done, desc="training", unit="step", disable=not is_first)
    require_same_replicas(trainer, loader, done)
    in_a_row = resumed.skipped_in_a_row if resumed else 0
    guard = DivergenceGuard(trainer, loader, output_dir, recipe.faults.max_skipped, in_a_row)
    while done < last and not (reason := _between_steps(stop, saver, trainer)):
        heart.at("training", done)
        save_now = _due(done + 1, recipe.train.save_every, last)
        check_now = save_now or _due(done + 1, recipe.faults.check_every, last)
        with weights_compared_before_update(trainer, done) if check_now else nullcontext():
            record = _step(trainer, loader, guard, done, last, profile)
        done += 1
        record |= _judge(trainer, heldout, decoded, heart, done, last)
        if metrics is not None:
            metrics.write(record, durably=save_now)
        if check_now:
            require_same_replicas(trainer, loader, done)
        if save_now:
            heart.at("saving", done)
            saver.save(_progress(record, loader, guard))
            saved = done
        progress.set_postfix(loss=f"{record['loss']:.3f}", tau=f"{record['tau']:.2f}", refresh=False)
        progress.update()
    progress.close()
    if profile is not None:
        profile.close()
    if reason and saved != done:
        saver.save(Progress(done, loader.packs_before(done), skipped_in_a_row=guard.in_a_row))
    saver.finish()
    if not reason:
        save_weights(trainer, output_dir / FINAL_WEIGHTS)
    elif is_first:
        where = output_dir / CHECKPOINTS / folder_name(done)
        words = "stopped by %s after step %d of %d; start again with --resume to go on from %s"
        logger.info(words, reason, done, last, where)


def _judge(
    trainer: DraftTrainer,
    heldout: Sequence[PackedSequence],
    decoded: DecodedAcceptance | None,
    heart: Heart,
    done: int,
    last: int,
) -> dict[str, Any]:
    """What is due after this step of held-out evaluation and decoding, by the keys of metrics.jsonl."""
    found: dict[str, Any] = {}
    if heldout and _due(done, trainer.recipe.train.eval_every, last):
        heart.at("evaluating", done)
        found["heldout"] = trainer.evaluate(heldout).as_dict()
    if decoded is not None and _due(done, trainer.recipe.eval.during, last):
        heart.at("decoding", done)
        found[DECODED] = decoded.measure()
    return found


def _progress(record: dict[str, Any], loader: StepSource, guard: DivergenceGuard) -> Progress:
    """How far a run is after the step of this record, and how its draft did there."""
    held, done = record.get("heldout", {}), record["step"]
    lengths = (held.get("acceptance_length"), record.get(DECODED))
    return Progress(done, loader.packs_before(done), held.get("loss"), guard.in_a_row, *lengths)


def _between_steps(stop: StopRequest, saver: CheckpointSaver, trainer: DraftTrainer) -> str:
    """Agree whether to stop, and finish a checkpoint once the threads of all ranks have written it.
    Collective: ranks that decided alone would leave the others in the next step's collectives.

    Returns:
        Why all ranks stop here; an empty text when they go on.
    """
    reason, writing = max_over_ranks([stop.reason, saver.state], trainer.topology.device)
    if saver.is_pending and writing != WRITING:
        saver.finish()
    return REASONS[reason]


def _step(
    trainer: DraftTrainer,
    loader: StepSource,
    guard: DivergenceGuard,
    index: int,
    last: int,
    profile: StepProfile | None,
) -> dict[str, Any]:
    """Take optimizer step `index` (from 0), and return its record for metrics.jsonl."""
    rate = learning_rate_at(trainer.recipe, index, last)
    started = time.perf_counter()
    with profiled_step(profile, index + 1):
        packs = marked(DATA)(loader.step)(index)
        waited = time.perf_counter() - started
        if profile is not None:
            profile.count(packs)
        report = trainer.step(packs, rate)
        seconds = time.perf_counter() - started
    return {
        "step": index + 1,
        "lr": rate,
        **report.as_dict(),
        **({"skipped": True} if guard.skipped(index, report) else {}),
        "tokens_per_s": report.tokens / seconds,
        "wait_s": waited,
        "peak_memory_bytes": peak_memory_bytes(trainer.topology.device),
    }


def save_weights(trainer: DraftTrainer, path: Path) -> None:
    """Gather the draft's whole weights, and write them to one file by rank 0. Collective."""
    weights = trainer.state_dict()
    if trainer.topology.place.rank == 0:
        aside = path.with_name(f".{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(aside))
        let_others_read(aside)
        os.replace(aside, path)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
