"""From a rollout to the pack that is trained on: what this rank reads of it is checked and, where a server
wrote it, read.

Legend: L tokens of a packed sequence, Ht hidden size of the target, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.layout import LocalRows, PackedSequence, Supervision
from eagle3_ds.serving.rows import Expected, RowFile
from eagle3_ds.targets import choose_aux_layers, target_fingerprint, teacher_tokens
from eagle3_ds.targets.end import TargetEnd, load_target_end
from eagle3_ds.topology import Topology
from eagle3_ds.train.rollout_inputs import (
    AnyRollout,
    HostRows,
    ServedRollout,
    check_supervised,
    check_tokens,
    checked_rows,
)
from eagle3_ds.train.served_spans import SpanReader
from eagle3_ds.train.spans import plan_spans


class RolloutPacks:
    """Makes packs of rollouts, by the target as it is: its head and its final norm may be replaced.

    Args:
        folder, config: of the model that the target began as.
        head: [V, Ht], on the CPU.
        aux_size: numbers of an aux row.
    """

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        supervision: Supervision,
        folder: Path,
        config: Any,
        head: Tensor,
        aux_size: int,
    ) -> None:
        self._recipe, self._topology, self._supervision = recipe, topology, supervision
        self._folder, self._config = folder, config
        self.head = head
        self._aux_size, self._teacher_size = aux_size, int(config.hidden_size)
        self._reader: SpanReader | None = None
        self._norm: Mapping[str, Tensor] | None = None
        self._norm_is_known = True

    def use_target(self, head: Tensor, norm: Mapping[str, Tensor] | None) -> None:
        """Go on with another head [V, Ht] on the CPU and the `state_dict` of the final norm; without the norm
        rows of a server, which are those before it, are refused.
        """
        self.head, self._norm_is_known = head, norm is not None
        if norm is not None:
            self._norm = {name: tensor.detach().cpu().clone() for name, tensor in norm.items()}
        if self._reader is not None:
            self._reader.use_head(head)
            self._take_norm(self._reader.end)

    def device_tensors(self) -> list[Tensor]:
        """What lies on the device from the first rollout of a server on."""
        return [] if self._reader is None else [self._reader.end.head]

    def expected(self) -> Expected:
        """What a server's file of this target must hold."""
        return self._served_reader().expected

    def pack(self, rollout: AnyRollout) -> PackedSequence:
        """Check the rows that this rank reads, and make a pack. Teacher tokens that are computed here are
        computed for those rows only, and are 0 elsewhere.

        Raises:
            ValueError: the rollout cannot be trained on.
        """
        length = check_tokens(rollout, len(self.head))
        place, loss_mask = self._topology.place, rollout.loss_mask.cpu().bool()
        check_supervised(rollout.lengths, loss_mask, self._supervision)
        if isinstance(rollout, ServedRollout):
            return self._served_pack(rollout, loss_mask)
        plan = plan_spans(self._recipe, rollout.lengths, loss_mask)
        own = plan.slots(place.ring_rank, place.ulysses_rank)
        read = plan.teacher_slots(place.ring_rank, place.ulysses_rank, self._supervision.halo)
        for _ in checked_rows("aux", rollout.aux, own, length, self._aux_size):
            pass
        token = (
            torch.zeros(length, dtype=torch.int64)
            if rollout.teacher_token is None
            else rollout.teacher_token.cpu().long()
        )
        for slots, rows in checked_rows("teacher", rollout.teacher, read, length, self._teacher_size):
            if rollout.teacher_token is None:
                token[slots] = self._greedy_tokens(rows)
        return PackedSequence(
            token_ids=rollout.token_ids.cpu().long(),
            loss_mask=loss_mask,
            lengths=tuple(rollout.lengths),
            teacher_token=token,
            aux=HostRows(rollout.aux),
            teacher=HostRows(rollout.teacher),
        )

    def _served_pack(self, rollout: ServedRollout, loss_mask: Tensor) -> PackedSequence:
        """A pack of the rows that a server wrote; this rank's are read, and checked, now."""
        if not self._norm_is_known:
            raise ValueError(
                "the target was updated without its final norm, which the rows of a server need: give "
                "update_target `norm`, the state_dict of the policy's final norm"
            )
        if len(rollout.files) != len(rollout.lengths):
            raise ValueError(
                f"files has {len(rollout.files)} paths for {len(rollout.lengths)} documents: give one for "
                "each"
            )
        reader = self._served_reader()
        token_ids = rollout.token_ids.cpu().long()
        files = [RowFile(Path(path), reader.expected) for path in rollout.files]
        for file, tokens in zip(files, token_ids.split(list(rollout.lengths)), strict=True):
            file.require_tokens(tokens.tolist())
        rows = reader.read(files, rollout.lengths, loss_mask)
        token = torch.zeros(len(token_ids), dtype=torch.int64)
        token[rows.read] = LocalRows(rows.token, rows.read, len(token_ids))[:]
        return PackedSequence(
            token_ids,
            loss_mask,
            tuple(rollout.lengths),
            teacher_token=token,
            aux=rows.aux,
            teacher=rows.teacher,
        )

    def _served_reader(self) -> SpanReader:
        """What reads a server's files; the target's final norm is loaded when the first are read."""
        if self._reader is None:
            section, topology = self._recipe.target, self._topology
            layers = choose_aux_layers(self._config.num_hidden_layers, section.aux_layers)
            weights = target_fingerprint(self._folder, layers, section.dtype)["target_weights"]
            dtype = getattr(torch, section.dtype)
            end = load_target_end(self._folder, self._config, dtype, topology.device)
            self._take_norm(end)
            expected = Expected.of(section, self._config, weights)
            # Rows are kept in the dtype in which the server computed them.
            self._reader = SpanReader(self._recipe, topology, expected, end, section.dtype)
            self._reader.use_head(self.head)
        return self._reader

    def _take_norm(self, end: TargetEnd) -> None:
        """Fill the final norm with the weights of the last `update_target`, if it gave some."""
        if self._norm is not None:
            end.norm.load_state_dict(self._norm)

    def _greedy_tokens(self, teacher: Tensor) -> Tensor:
        """The target's tokens int64 [n] for its hidden states [n, Ht], in the target's dtype as capture
        computes them.
        """
        device, dtype = self._topology.device, getattr(torch, self._recipe.target.dtype)
        return teacher_tokens(teacher.to(device, dtype), self.head.to(device, dtype)).cpu()
