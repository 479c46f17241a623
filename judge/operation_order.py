"""Whether the ranks' orders of torch.distributed operations can come to a deadlock: a pure function of them.

gloo takes operations of one group in several orders that NCCL does not take. NCCL wants all members of a
communicator to issue its operations in one order, and a rank's operations on several communicators must not
wait for each other in a circle. The worst case is a device that runs one operation at a time, in the order of
issue, and holds it until all participants have arrived, nothing buffered. Orders that run to their end there
run to their end wherever operations start in the order of issue, also when some run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

Orders = Mapping[int, Sequence["Operation"]]
"""What each rank issued, in this order."""
POINT_TO_POINT = {"send": "recv", "recv": "send"}
"""Each kind with that of its counterpart."""


@dataclass(frozen=True)
class Operation:
    """One operation that a rank issued.

    Attributes:
        communicator: the group's name, which is the same on all of its ranks.
        group: its global ranks, in the order of their ranks in it.
        kind: as in `judge.collective_calls`, or `recv` or `barrier`.
        tensors: (dtype, shape) of each tensor that this rank sends, or receives by `recv`.
        root: global rank that broadcasts or gets the sum.
        peer: global rank at the other end of a send or receive.
        batch: number of the batch that a send or receive was issued in; None when it was issued alone.
        splits: rows that an uneven all-to-all sends to each member, and rows that it receives from each.
    """

    communicator: str
    group: tuple[int, ...]
    kind: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    root: int | None = None
    peer: int | None = None
    batch: int | None = None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        sizes = "".join(f" {dtype}{list(shape)}" for dtype, shape in self.tensors)
        ends = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}"}.get(self.kind, "")
        root = "" if self.root is None else f", root {self.root}"
        splits = "" if self.splits is None else f", rows sent {self.splits[0]}, received {self.splits[1]}"
        return f"{self.kind}{ends}{sizes}{root}{splits} on ranks {list(self.group)} ({self.communicator})"

    @property
    def is_collective(self) -> bool:
        return self.kind not in POINT_TO_POINT

    @property
    def amounts(self) -> tuple[tuple[str, int], ...]:
        """(dtype, elements) of each tensor: what NCCL is told of it."""
        return tuple((dtype, math.prod(shape)) for dtype, shape in self.tensors)

    @property
    def agreed(self) -> tuple[object, ...]:
        """What all members of a collective must give alike."""
        if self.splits is None:
            return self.kind, self.amounts, self.root
        # How many rows there are may differ between members; `_split_fault` compares them in pairs.
        return self.kind, tuple((dtype, shape[1:]) for dtype, shape in self.tensors), self.root


def order_fault(orders: Orders) -> str | None:
    """What keeps the ranks from their end, in words with ranks and operations; None when nothing does.

    Checked one after the other: every member of a group has an order; members of a communicator issue the
    same collectives; every send has its receive; and all orders run to their end in the worst case.
    """
    return (
        _missing_rank(orders) or _collective_fault(orders) or _point_to_point_fault(orders) or _stuck(orders)
    )


def _missing_rank(orders: Orders) -> str | None:
    for rank, order in orders.items():
        for place, operation in enumerate(order):
            if rank not in operation.group:
                return f"rank {rank} issued as its operation {place} {operation}, of which it is no member"
            missing = sorted(set(operation.group) - orders.keys())
            if missing:
                return (
                    f"rank {rank} issued as its operation {place} {operation}, and ranks {missing} have no "
                    "order"
                )
    return None


def _collective_fault(orders: Orders) -> str | None:
    """Of each communicator, the first collective that its members did not issue alike.

    All of them are told: ranks that went apart wait in different communicators, and only the two ends
    together show where.
    """
    faults = [_fault_of(group, communicator, orders) for communicator, group in _communicators(orders)]
    return "; ".join(fault for fault in faults if fault) or None


def _fault_of(group: tuple[int, ...], communicator: str, orders: Orders) -> str | None:
    issued = {rank: _collectives(orders[rank], communicator, group) for rank in group}
    first = group[0]
    for other in group[1:]:
        for number, pair in enumerate(zip_longest(issued[first], issued[other])):
            fault = _difference(first, other, *pair)
            if fault is not None:
                return f"collective {number} on ranks {list(group)} ({communicator}): {fault}"
    for number, members in enumerate(zip(*(issued[rank] for rank in group), strict=True)):
        fault = _split_fault(members)
        if fault is not None:
            return f"collective {number} on ranks {list(group)} ({communicator}): {fault}"
    return None


def _difference(first: int, other: int, mine: Operation | None, its: Operation | None) -> str | None:
    if mine is None or its is None:
        issuer, lacking, operation = (other, first, its) if mine is None else (first, other, mine)
        return f"rank {issuer} issued {operation}, which rank {lacking} did not"
    if mine.agreed == its.agreed and (mine.splits is None) == (its.splits is None):
        return None
    return f"rank {first} issued {mine}, rank {other} issued {its}"


def _split_fault(members: Sequence[Operation]) -> str | None:
    """Two members of an uneven all-to-all of which one sends another number of rows than the other awaits."""
    group = members[0].group
    for sender, sent in enumerate(members):
        for receiver, received in enumerate(members):
            if sent.splits is None or received.splits is None:
                continue
            given, awaited = sent.splits[0][receiver], received.splits[1][sender]
            if given != awaited:
                ends = f"rank {group[sender]} sends {given} rows to rank {group[receiver]}"
                return f"{ends}, which awaits {awaited}"
    return None


def _point_to_point_fault(orders: Orders) -> str | None:
    """The first send or receive that has no counterpart of the same size."""
    for communicator, group in _communicators(orders):
        for source in group:
            for target in group:
                sends = _messages(orders[source], communicator, group, "send", target)
                receives = _messages(orders[target], communicator, group, "recv", source)
                for number, (send, receive) in enumerate(zip_longest(sends, receives)):
                    pair = f"message {number} from rank {source} to rank {target}"
                    where = f"{pair} on ranks {list(group)} ({communicator})"
                    if receive is None:
                        return f"{where}: rank {source} issued {send}, and rank {target} receives nothing"
                    if send is None:
                        return f"{where}: rank {target} issued {receive}, and rank {source} sends nothing"
                    if send.amounts != receive.amounts:
                        return f"{where}: rank {source} issued {send}, rank {target} issued {receive}"
    return None


def _communicators(orders: Orders) -> list[tuple[str, tuple[int, ...]]]:
    return list(dict.fromkeys((op.communicator, op.group) for order in orders.values() for op in order))


def _collectives(order: Sequence[Operation], communicator: str, group: tuple[int, ...]) -> list[Operation]:
    return [op for op in order if op.is_collective and (op.communicator, op.group) == (communicator, group)]


def _messages(
    order: Sequence[Operation], communicator: str, group: tuple[int, ...], kind: str, peer: int
) -> list[Operation]:
    of_pair = (communicator, group, kind, peer)
    return [op for op in order if (op.communicator, op.group, op.kind, op.peer) == of_pair]


class _Rank:
    """A rank in the worst case: what it waits in, a collective or the sends and receives of one batch."""

    def __init__(self, order: Sequence[Operation]) -> None:
        self._turns = _turns(order)
        self.place = -1
        self.waiting: list[Operation] = []
        self.go_on()

    def go_on(self) -> None:
        self.waiting = list(next(self._turns, ()))
        self.place += 1


def _turns(order: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Operations that a rank issues at once: the sends and receives of one batch, else one."""
    turn: list[Operation] = []
    for operation in order:
        if turn and (operation.batch is None or operation.batch != turn[-1].batch):
            yield turn
            turn = []
        turn.append(operation)
    if turn:
        yield turn


def _stuck(orders: Orders) -> str | None:
    """The circle of ranks that wait for each other in the worst case."""
    ranks = {rank: _Rank(order) for rank, order in orders.items()}
    while any(_advance(rank, ranks) for rank in ranks):
        pass
    waiting = [rank for rank, state in ranks.items() if state.waiting]
    if not waiting:
        return None
    chain = [waiting[0]]
    while (awaited := _awaited(chain[-1], ranks)) not in chain:
        chain.append(awaited)
    circle = chain[chain.index(awaited) :]
    words = [
        f"rank {rank} waits in its turn {ranks[rank].place}, {ranks[rank].waiting[0]}, for rank {after}"
        for rank, after in zip(circle, [*circle[1:], circle[0]], strict=True)
    ]
    return f"a circle: {'; '.join(words)}"


def _advance(rank: int, ranks: Mapping[int, _Rank]) -> bool:
    """Let what `rank` waits in happen, as far as the others have arrived. Returns whether anything did."""
    state = ranks[rank]
    if not state.waiting:
        return False
    first = state.waiting[0]
    if first.is_collective:
        if any(not _has_arrived(first, ranks[member]) for member in first.group):
            return False
        for member in first.group:
            ranks[member].go_on()
        return True
    met = False
    for operation in list(state.waiting):
        counterpart = _counterpart(rank, operation, ranks)
        if counterpart is not None and operation in state.waiting:
            assert operation.peer is not None
            state.waiting.remove(operation)
            ranks[operation.peer].waiting.remove(counterpart)
            if not ranks[operation.peer].waiting:
                ranks[operation.peer].go_on()
            met = True
    if met and not state.waiting:
        state.go_on()
    return met


def _has_arrived(collective: Operation, member: _Rank) -> bool:
    """Whether a member is at this collective. It is the same one: the members' collectives on one
    communicator were compared before.
    """
    return bool(member.waiting) and (
        member.waiting[0].is_collective
        and (member.waiting[0].communicator, member.waiting[0].group)
        == (collective.communicator, collective.group)
    )


def _counterpart(rank: int, operation: Operation, ranks: Mapping[int, _Rank]) -> Operation | None:
    assert operation.peer is not None
    wanted = (operation.communicator, operation.group, POINT_TO_POINT[operation.kind], rank)
    there = ranks[operation.peer].waiting
    return next((op for op in there if (op.communicator, op.group, op.kind, op.peer) == wanted), None)


def _awaited(rank: int, ranks: Mapping[int, _Rank]) -> int:
    """A rank that has not arrived at what `rank` waits in."""
    first = ranks[rank].waiting[0]
    if not first.is_collective:
        assert first.peer is not None
        return first.peer
    return next(member for member in first.group if not _has_arrived(first, ranks[member]))
