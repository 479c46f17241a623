"""Training as a whole: prepare, capture, train on many ranks, and restart a failed run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.checkpoint.format import FINAL_WEIGHTS
from eagle3_ds.config import Recipe, as_recipe
from eagle3_ds.launch.command import LaunchPlan, write_environment_file
from eagle3_ds.launch.logs import Logs
from eagle3_ds.launch.ranks import Outcome, run_with_restarts
from eagle3_ds.launch.state import STOPPED, Notes, noted
from eagle3_ds.run.cache_uses import in_use
from eagle3_ds.run.checks import check_places, clear_output
from eagle3_ds.run.memory_advice import advise_on_memory
from eagle3_ds.run.resolve import ResolvedRun, RunOptions, resolve_run
from eagle3_ds.run.served_states import streaming
from eagle3_ds.run.stages import capture, evaluate, export, prepare, report, save_resolved
from eagle3_ds.train.tracking import add_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """How training ended.

    Attributes:
        status: 0 when no rank failed; else the launcher's exit status.
        finished: whether all steps were done; false also after a request to stop.
        reason: the first error; empty without one.
    """

    status: int
    finished: bool
    reason: str = ""

    @property
    def exit_status(self) -> int:
        """0 after the last step, 75 after a request to stop, else `status`."""
        return self.status if self.finished or self.status else STOPPED


def train(recipe: Recipe | str | Path, options: RunOptions | None = None) -> Path | None:
    """Train a draft like `eagle3-ds launch`, but without evaluation and export: prepare what is missing,
    start the ranks, and wait for their end.

    Call it in the main thread: it sets handlers for SIGINT, SIGTERM and SIGUSR1, which pass these signals on
    to the ranks.

    Args:
        recipe: a recipe, or the path of one.
        options: hosts, ranks, resuming and overwriting; None starts a new run on this machine.

    Returns:
        The file of the final weights; None when the run was asked to stop before its end.

    Raises:
        ValueError: the recipe or the options have a mistake; nothing was started.
        RuntimeError: a rank has failed. The message is the first error.
    """
    trained = train_run(resolve_run(as_recipe(recipe), options))
    if trained.status:
        raise RuntimeError(
            f"training failed: {trained.reason or f'the launcher ended with status {trained.status}'}"
        )
    return Path(as_recipe(recipe).output_dir) / FINAL_WEIGHTS if trained.finished else None


def train_run(run: ResolvedRun) -> Trained:
    """Prepare, capture and train; a failed run is started again as often as `faults.max_restarts` says.

    Raises:
        ValueError: a host cannot be reached, or the data, the target or the disk cannot be used.
    """
    check_places(run.recipe, run.plan, run.options.where.launcher)
    output_dir = Path(run.recipe.output_dir)
    if run.checkpoint is None:
        clear_output(output_dir)
    save_resolved(run.recipe)
    with noted(output_dir) as notes:
        trained = _prepare_and_train(run, notes)
        notes.ended(trained.exit_status, trained.reason)
    return trained


def _prepare_and_train(run: ResolvedRun, notes: Notes) -> Trained:
    with in_use(run.recipe):
        notes.at("preparing")
        # How the ranks of the run before ended is not how these do.
        Logs(run.plan.logs).prepare()
        prepare(run.recipe, run.checkpoint)
        notes.at("capturing")
        status = capture(run.recipe, run.capture_plan)
        if status:
            return Trained(status, finished=False)
        write_environment_file(run.plan)
        notes.at("training")
        with streaming(run.recipe, len(run.plan.hosts)):
            outcome = run_with_restarts(run.plan, lambda: _plan_again(run), run.recipe.faults.max_restarts)
    if outcome.status:
        _advise(run, outcome)
        return Trained(outcome.status, False, outcome.reason)
    finished = (Path(run.recipe.output_dir) / FINAL_WEIGHTS).is_file()
    if not finished:
        logger.info(
            "training was stopped before its end: the same command with --resume goes on, then exports "
            "and evaluates"
        )
    return Trained(0, finished)


def capture_run(run: ResolvedRun) -> int:
    """Prepare, and hidden states by all ranks, nothing after; returns the launcher's exit status."""
    check_places(run.recipe, run.capture_plan, run.options.where.launcher)
    with in_use(run.recipe):
        prepare(run.recipe)
        return capture(run.recipe, run.capture_plan)


def finish_run(recipe: Recipe) -> None:
    """What follows training: exports first, which nothing after them can lose, then evaluation and report,
    whose picture the trackers get.

    Raises:
        ValueError, NotLosslessError: of the export or the evaluation; the report is drawn all the same, from
            what is there.
    """
    with noted(Path(recipe.output_dir)) as notes:
        notes.at("finishing")
        try:
            with in_use(recipe):
                export(recipe)
                evaluate(recipe)
        finally:
            add_report(recipe, report(recipe))
        notes.ended(0)


def _plan_again(run: ResolvedRun) -> LaunchPlan:
    again = run.again()
    for note in again.notes:
        logger.info("note: %s", note)
    write_environment_file(again.plan)
    return again.plan


def _advise(run: ResolvedRun, outcome: Outcome) -> None:
    """What would have fitted, when a rank ran out of memory."""
    ranks_per_host = max(len(slots) for slots in run.plan.hosts.values())
    advice = advise_on_memory(outcome.reason, run.recipe, ranks_per_host)
    if advice is not None:
        logger.error("\n%s", advice)
