"""Optimizer steps whose loss or gradient is not finite: skipped, explained, and the end of the run when they do not stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.layout import PackedSequence
from eagle3_ds.train.trainer import DraftTrainer, StepReport

FOLDER = "divergence"


class Loader(Protocol):
    """What is asked of the data: pure functions of the step, counted from 0."""

    def step(self, index: int) -> list[PackedSequence]: ...

    def documents(self, index: int) -> list[int]: ...


class DivergenceGuard:
    """Judges each step that the trainer has taken. No weight was touched by a step that is not finite, see `step_and_norm`.

    Args:
        max_skipped: so many such steps in a row are let pass; the next one ends the run.
    """

    def __init__(self, trainer: DraftTrainer, loader: Loader, output_dir: Path, max_skipped: int) -> None:
        self.trainer, self.loader, self.folder, self.max_skipped = trainer, loader, output_dir / FOLDER, max_skipped
        self.in_a_row = 0

    def skipped(self, index: int, report: StepReport) -> bool:
        """Whether step `index` (from 0) was skipped. Collective when it was: the documents to blame are found and saved.

        Raises:
            FloatingPointError: too many in a row.
        """
        assert report.grad_norm is not None
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        blamed = self._blamed(index)
        text = _explain(index, report, blamed, self.folder)
        if self.in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{text} It is the {self.in_a_row}. in a row, and faults.max_skipped is {self.max_skipped}. Take these documents "
                "out, or lower train.learning_rate and go on from the last checkpoint by --resume."
            )
        if self.trainer.topology.place.rank == 0:
            print(f"{text} Skipped, {self.in_a_row} in a row of at most {self.max_skipped}.", flush=True)
        return True

    def _blamed(self, index: int) -> dict[int, list[int]]:
        """{document: TTT steps at which its loss is not finite}, over all ranks; documents that are well are left out.

        Each document is run by itself, as often on every rank. Those of this draft_dp rank are saved by its first sp rank.
        """
        topology = self.trainer.topology
        documents = [document for pack in self.loader.step(index) for document in split_documents(pack)]
        numbers = self.loader.documents(index)
        turns = int(_over_ranks(torch.tensor([len(documents)], device=topology.device), dist.ReduceOp.MAX))
        width = 1 + self.trainer.recipe.draft.ttt_steps
        # Per rank and turn: 1 + the document's number, then which TTT steps are not finite.
        rows = torch.zeros(topology.mesh.world_size, turns, width, dtype=torch.int64, device=topology.device)
        for turn in range(turns):
            if turn < len(documents):
                bad = ~self.trainer.own_losses(documents[turn]).isfinite()
                rows[topology.place.rank, turn] = torch.tensor([1 + numbers[turn], *bad.tolist()])
            else:
                # Takes part in the others' collectives.
                self.trainer.own_losses(replace(documents[0], loss_mask=torch.zeros_like(documents[0].loss_mask)))
        blamed: dict[int, set[int]] = {}
        for number, *bad in _over_ranks(rows, dist.ReduceOp.SUM).flatten(0, 1).tolist():
            if any(bad):
                blamed.setdefault(number - 1, set()).update(step for step, flag in enumerate(bad) if flag)
        if topology.sp_rank == 0:
            self._save(index, dict(zip(numbers, documents, strict=True)), blamed)
        return {number: sorted(steps) for number, steps in sorted(blamed.items())}

    def _save(self, index: int, documents: Mapping[int, PackedSequence], blamed: Mapping[int, set[int]]) -> None:
        """The blamed ones among these documents, or all when nobody is to blame, one file each."""
        self.folder.mkdir(exist_ok=True)
        for number, document in documents.items():
            if number in blamed or not blamed:
                tensors = {
                    "token_ids": document.token_ids,
                    "loss_mask": document.loss_mask,
                    "bad_rows_of_aux": _bad_rows(document.aux[: len(document.token_ids)]),
                    "bad_rows_of_teacher": _bad_rows(document.teacher[: len(document.token_ids)]),
                    "bad_ttt_steps": torch.tensor(sorted(blamed.get(number, ())), dtype=torch.int64),
                }
                save_file(tensors, str(self.folder / f"step-{index + 1:06d}_document-{number}.safetensors"))


def split_documents(pack: PackedSequence) -> list[PackedSequence]:
    """A pack for each of a pack's documents, hidden states read."""
    ends = list(accumulate(pack.lengths))
    pieces = [slice(end - length, end) for end, length in zip(ends, pack.lengths, strict=True)]
    return [
        PackedSequence(
            pack.token_ids[rows],
            pack.loss_mask[rows],
            (rows.stop - rows.start,),
            pack.teacher_token[rows],
            pack.aux[rows],
            pack.teacher[rows],
        )
        for rows in pieces
    ]


def _explain(index: int, report: StepReport, blamed: Mapping[int, Sequence[int]], folder: Path) -> str:
    steps = [step for step, loss in enumerate(report.step_loss) if not math.isfinite(loss)]
    if steps:
        what = f"the loss of step {index + 1} is not finite at TTT steps {steps}"
    else:
        what = f"the gradient of step {index + 1} is not finite (norm {report.grad_norm}), its loss {report.loss:.4g} is"
    whose = (
        "; ".join(f"document {number} at TTT steps {list(steps)}" for number, steps in blamed.items())
        or "no single document has a loss that is not finite"
    )
    return f"{what}: {whose}. See {folder} for the documents."


def _bad_rows(rows: Tensor) -> Tensor:
    return (~rows.isfinite().all(1)).nonzero()[:, 0]


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values
