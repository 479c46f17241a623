"""Recording the order in which a rank issues torch.distributed operations, those of DeepSpeed included.

Every operation is written before it runs, so the record of a rank that hangs ends with what it hangs in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from judge.collective_calls import OPERATORS, group_of
from judge.operation_order import Operation

# As OPERATORS, with what is not counted there; None: no tensor is sent.
_ALL: dict[str, tuple[str, int | None]] = {
    **OPERATORS,
    "recv_": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}
# The argument that names a rank of the group: the root, or the peer.
_ROOT = {"broadcast_": 2, "reduce_": 3}
_PEER = {"send": 2, "recv_": 2}


class OrderRecord(TorchDispatchMode):
    """Inside its `with` block, writes the operations of rank `rank` to a file of `folder`. Which reduction
    (sum, maximum) they do is not seen.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        self._path = _path(folder, rank)
        self._file: TextIO | None = None
        self._batch: int | None = None
        self._batches = 0
        self._cleanup = ExitStack()

    def __enter__(self) -> OrderRecord:
        self._file = self._cleanup.enter_context(self._path.open("w", encoding="utf-8"))
        batch = dist.batch_isend_irecv

        def numbered(operations: list[Any]) -> list[dist.Work]:
            with self._next_batch():
                return batch(operations)

        self._cleanup.enter_context(mock.patch.object(dist, "batch_isend_irecv", numbered))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._cleanup.close()

    @contextmanager
    def _next_batch(self) -> Iterator[None]:
        self._batch, self._batches = self._batches, self._batches + 1
        try:
            yield
        finally:
            self._batch = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            assert self._file is not None
            operation = self._operation(func.overloadpacket.__name__, args)
            self._file.write(json.dumps(asdict(operation)) + "\n")
            self._file.flush()
        return func(*args, **(kwargs or {}))

    def _operation(self, operator: str, args: Sequence[Any]) -> Operation:
        if operator not in _ALL:
            raise NotImplementedError(f"c10d.{operator} is not known here. Add it to the table above.")
        kind, position = _ALL[operator]
        group = group_of(tuple(args))
        ranks = tuple(dist.get_process_group_ranks(group))
        leaves = [] if position is None else tree_leaves(args[position])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        splits = None
        if operator == "alltoall_base_" and (args[3] or args[4]):
            rows = ((args[4], args[1].shape[0]), (args[3], args[0].shape[0]))
            sent, received = (tuple(given or [total // len(ranks)] * len(ranks)) for given, total in rows)
            splits = (sent, received)
        return Operation(
            group.group_name,
            ranks,
            kind,
            tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors),
            root=ranks[args[_ROOT[operator]]] if operator in _ROOT else None,
            peer=ranks[args[_PEER[operator]]] if operator in _PEER else None,
            batch=self._batch,
            splits=splits,
        )


def read_orders(folder: Path, world_size: int) -> dict[int, list[Operation]]:
    """What each rank issued, by rank; ranks that left no record are missing."""
    paths = {rank: _path(folder, rank) for rank in range(world_size)}
    return {
        rank: [_read(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for rank, path in paths.items()
        if path.is_file()
    }


def _read(line: str) -> Operation:
    fields = json.loads(line)
    fields["group"] = tuple(fields["group"])
    fields["tensors"] = tuple((dtype, tuple(shape)) for dtype, shape in fields["tensors"])
    if fields["splits"] is not None:
        sent, received = fields["splits"]
        fields["splits"] = (tuple(sent), tuple(received))
    return Operation(**fields)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"order_{rank}.jsonl"
