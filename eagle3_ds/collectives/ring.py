"""Point-to-point exchange around a ring: send to the next rank while receiving from the previous one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.parts import EXCHANGE, marked


class RingTransfer:
    """One exchange under way. It keeps the sent buffers alive until `wait`.

    Args:
        works: the pending sends and receives.
        sent, received: one flat buffer per dtype.
        like: tensors with the shapes and dtypes of those that arrive.
    """

    def __init__(
        self,
        works: list[dist.Work],
        sent: list[Tensor],
        received: dict[torch.dtype, Tensor],
        like: Sequence[Tensor],
    ) -> None:
        self._works, self._sent, self._received = works, sent, received
        self._layout = [(tensor.dtype, tensor.shape) for tensor in like]

    @marked(EXCHANGE)
    def wait(self) -> list[Tensor]:
        """The tensors of the previous rank, as views of the received buffers. Call it once."""
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []
        offsets = dict.fromkeys(self._received, 0)
        tensors = []
        for dtype, shape in self._layout:
            start, offsets[dtype] = offsets[dtype], offsets[dtype] + shape.numel()
            tensors.append(self._received[dtype][start : offsets[dtype]].view(shape))
        return tensors


class RingExchange:
    """A ring over the ranks of a group. With None or one rank, an exchange returns a copy of what it was
    given.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            place = group.rank()
            self._next, self._previous = ranks[(place + 1) % self.size], ranks[(place - 1) % self.size]

    @marked(EXCHANGE)
    def start(self, tensors: Sequence[Tensor]) -> RingTransfer:
        """Send `tensors`, of any shapes, to the next rank and receive the previous rank's, of the same ones.

        Collective over the ring: every rank makes the same calls in the same order. The tensors are copied
        into one buffer per dtype, so the caller may change them at once, and a hop costs one message per
        dtype.
        """
        sent: dict[torch.dtype, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            sent[dtype] = torch.cat([tensor.reshape(-1) for tensor in tensors if tensor.dtype == dtype])
        if self.size == 1:
            return RingTransfer([], [], sent, tensors)
        received = {dtype: torch.empty_like(buffer) for dtype, buffer in sent.items()}
        # All sends and receives are posted in one batch before anything waits. If each rank sent first and
        # received afterwards, a blocking send could wait for a receive that never starts: a deadlock.
        operations = []
        for dtype, buffer in sent.items():
            operations.append(dist.P2POp(dist.isend, buffer, self._next, self.group))
            operations.append(dist.P2POp(dist.irecv, received[dtype], self._previous, self.group))
        return RingTransfer(dist.batch_isend_irecv(operations), list(sent.values()), received, tensors)
