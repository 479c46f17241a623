"""Optimizer steps whose loss or gradient is not finite. Each is skipped and the documents that caused it are
saved; too many in a row end the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.guard.trained import StepFigures, Trained
from eagle3_ds.layout import PackedSequence

logger = logging.getLogger(__name__)

FOLDER = "divergence"


class DocumentsOfStep(Protocol):
    """What the guard needs of the data: pure functions of the step, counted from 0."""

    def documents(self, step: int) -> list[int]: ...

    def document(self, step: int, place: int) -> PackedSequence: ...


@dataclass(frozen=True)
class Blame:
    """What is not finite in one document: its hidden states, its loss at these TTT steps, or both."""

    hidden_states: bool = False
    steps: frozenset[int] = frozenset()

    def __or__(self, other: Blame) -> Blame:
        return Blame(self.hidden_states or other.hidden_states, self.steps | other.steps)

    def __str__(self) -> str:
        return f"at TTT steps {sorted(self.steps)}" + (
            ", its hidden states are not finite either" if self.hidden_states else ""
        )


class DivergenceGuard:
    """Judges each step after the trainer took it. A step that is not finite has changed no weight, see
    `step_and_norm`.

    Args:
        max_skipped: how many steps in a row may be skipped; one more ends the run.
        in_a_row: for a resumed run, how many steps in a row were skipped right before its checkpoint.
    """

    def __init__(
        self, trainer: Trained, loader: DocumentsOfStep, output_dir: Path, max_skipped: int, in_a_row: int = 0
    ) -> None:
        self.trainer, self.loader, self.folder, self.max_skipped = (
            trainer,
            loader,
            output_dir / FOLDER,
            max_skipped,
        )
        self.in_a_row = in_a_row

    def skipped(self, index: int, report: StepFigures) -> bool:
        """Whether step `index` (from 0) was skipped. If it was, this is collective: the ranks find and save
        the documents that caused it.

        Raises:
            FloatingPointError: more than `max_skipped` steps in a row were skipped.
        """
        assert report.grad_norm is not None
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        blamed = self._blamed(index, len(report.step_loss))
        text = _explain(index, report, blamed, self.folder)
        if self.in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{text} It is the {self.in_a_row}. in a row, and faults.max_skipped is {self.max_skipped}. "
                "Take these documents out, or lower train.learning_rate and go on from the last checkpoint "
                "by --resume."
            )
        if self.trainer.topology.place.rank == 0:
            logger.warning("%s Skipped, %d in a row of at most %d.", text, self.in_a_row, self.max_skipped)
        return True

    def _blamed(self, index: int, num_guesses: int) -> dict[int, Blame]:
        """Find the documents of step `index`, on all ranks, that are not finite. Collective.

        Each document is run by itself. The forward is collective over the sp group, and over the world under
        ZeRO-3, so every rank runs the same number of documents. The first rank of each sp group saves its
        group's documents.

        Returns:
            {document id: what is not finite}, the same on all ranks.
        """
        topology = self.trainer.topology
        numbers = self.loader.documents(index)
        turns = int(_over_ranks(torch.tensor([len(numbers)], device=topology.device), dist.ReduceOp.MAX))
        # One row per rank and turn: 1 + the document's id (0 for no document), whether its hidden states are
        # not finite, and for each TTT step whether its loss is not finite.
        width = 2 + num_guesses
        table = torch.zeros(topology.mesh.world_size, turns, width, dtype=torch.int64, device=topology.device)
        documents: dict[int, dict[str, Tensor]] = {}
        for turn in range(turns):
            # A rank without a document left runs its first one again: the others would wait for it in their
            # collectives.
            pack = self.loader.document(index, turn if turn < len(numbers) else 0)
            losses, finite = self.trainer.own_losses(pack)
            if turn < len(numbers):
                row = [1 + numbers[turn], not finite, *(~losses.isfinite()).tolist()]
                table[topology.place.rank, turn] = torch.tensor(row, dtype=torch.int64)
                documents[numbers[turn]] = {"token_ids": pack.token_ids, "loss_mask": pack.loss_mask}
        blamed: dict[int, Blame] = {}
        for number, *bad in _over_ranks(table, dist.ReduceOp.SUM).flatten(0, 1).tolist():
            if any(bad):
                found = Blame(bool(bad[0]), frozenset(step for step, flag in enumerate(bad[1:]) if flag))
                blamed[number - 1] = blamed.get(number - 1, Blame()) | found
        if topology.sp_rank == 0:
            self._save(index, documents, blamed)
        return dict(sorted(blamed.items()))

    def _save(
        self, index: int, documents: Mapping[int, dict[str, Tensor]], blamed: Mapping[int, Blame]
    ) -> None:
        """Write one file for each blamed document among these, or for all of them when none is blamed."""
        self.folder.mkdir(exist_ok=True)
        for number, tensors in documents.items():
            if number in blamed or not blamed:
                steps = torch.tensor(sorted(blamed.get(number, Blame()).steps), dtype=torch.int64)
                path = self.folder / f"step-{index + 1:06d}_document-{number}.safetensors"
                save_file({**tensors, "bad_ttt_steps": steps}, str(path))
                path.chmod(0o644)  # safetensors leaves it to its owner


def _explain(index: int, report: StepFigures, blamed: Mapping[int, Blame], folder: Path) -> str:
    steps = [step for step, loss in enumerate(report.step_loss) if not math.isfinite(loss)]
    if steps:
        what = f"the loss of step {index + 1} is not finite at TTT steps {steps}"
    else:
        norm = f"norm {report.grad_norm}"
        what = f"the gradient of step {index + 1} is not finite ({norm}), its loss {report.loss:.4g} is"
    whose = (
        "; ".join(f"document {number} {blame}" for number, blame in blamed.items())
        or "no single document has a loss that is not finite"
    )
    return f"{what}: {whose}. See {folder} for the documents."


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values
