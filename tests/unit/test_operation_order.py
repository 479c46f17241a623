"""The judge of orders: every kind of deadlock in orders made up here is found and named, right ones pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from judge.operation_order import Operation, Orders, order_fault

ROW, TABLE = ("float32", (4,)), ("float32", (8, 2))


def reduced(*group: int, tensor: tuple[str, tuple[int, ...]] = ROW) -> Operation:
    return Operation("-".join(map(str, group)), group, "all_reduce", (tensor,))


def message(kind: str, peer: int, batch: int | None, group: tuple[int, ...] = (0, 1)) -> Operation:
    return Operation("ring", group, kind, (ROW,), peer=peer, batch=batch)


def hop(rank: int, size: int, batch: int | None) -> list[Operation]:
    """A rank's send to the next and receive from the previous one."""
    group = tuple(range(size))
    return [
        message("send", (rank + 1) % size, batch, group),
        message("recv", (rank - 1) % size, batch, group),
    ]


def split(sent: tuple[int, int], received: tuple[int, int]) -> Operation:
    rows = ("float32", (sum(sent), 2))
    return Operation("u", (0, 1), "all_to_all", (rows,), splits=(sent, received))


RIGHT: dict[str, Orders] = {
    "nothing": {0: [], 1: []},
    "two groups one after the other": {
        0: [reduced(0, 1), reduced(0, 2)],
        1: [reduced(0, 1), reduced(1, 3)],
        2: [reduced(0, 2), reduced(2, 3)],
        3: [reduced(1, 3), reduced(2, 3)],
    },
    "a ring of four, each hop in one batch": {
        rank: [*hop(rank, 4, 0), *hop(rank, 4, 1), reduced(0, 1, 2, 3)] for rank in range(4)
    },
    "a send alone and its receive": {0: [message("send", 1, None)], 1: [message("recv", 0, None)]},
    "an uneven all-to-all with empty parts": {0: [split((0, 3), (0, 2))], 1: [split((2, 0), (3, 0))]},
    "other shapes of as many elements": {
        0: [reduced(0, 1, tensor=("float32", (16,)))],
        1: [reduced(0, 1, tensor=TABLE)],
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_orders_run_to_their_end(name: str) -> None:
    assert order_fault(RIGHT[name]) is None


WRONG: dict[str, tuple[Orders, tuple[str, ...]]] = {
    "swapped on two groups": (
        {0: [reduced(0, 1), replace(reduced(0, 1), communicator="other")],
         1: [replace(reduced(0, 1), communicator="other"), reduced(0, 1)]},
        ("a circle: rank 0 waits in its turn 0, all_reduce float32[4] on ranks [0, 1] (0-1), for rank 1; "
         "rank 1 waits in its turn 0, all_reduce float32[4] on ranks [0, 1] (other), for rank 0",),
    ),
    "swapped on one group": (
        {0: [reduced(0, 1), reduced(0, 1, tensor=TABLE)], 1: [reduced(0, 1, tensor=TABLE), reduced(0, 1)]},
        ("collective 0 on ranks [0, 1]", "rank 0 issued all_reduce float32[4]",
         "rank 1 issued all_reduce float32[8, 2]"),
    ),
    "a rank that skips": (
        {0: [reduced(0, 1, 2)], 1: [reduced(0, 1, 2)], 2: []},
        ("rank 0 issued all_reduce float32[4] on ranks [0, 1, 2]", "which rank 2 did not"),
    ),
    "a rank that skips and waits elsewhere": (
        {0: [reduced(0, 1), reduced(0, 1, 2)], 1: [reduced(0, 1, 2)],
         2: [reduced(0, 1, 2), reduced(2, 3)], 3: []},
        ("on ranks [0, 1] (0-1): rank 0 issued", "which rank 1 did not; collective 0 on ranks [2, 3]"),
    ),
    "a rank without an order": ({0: [reduced(0, 1)]}, ("operation 0", "ranks [1] have no order")),
    "a rank that is no member": ({0: [], 1: [], 2: [reduced(0, 1)]}, ("rank 2", "no member")),
    "other sizes": (
        {0: [reduced(0, 1)], 1: [reduced(0, 1, tensor=("float32", (5,)))]},
        ("rank 0 issued all_reduce float32[4]", "rank 1 issued all_reduce float32[5]"),
    ),
    "other dtypes": (
        {0: [reduced(0, 1)], 1: [reduced(0, 1, tensor=("bfloat16", (4,)))]}, ("float32[4]", "bfloat16[4]"),
    ),
    "other kinds": (
        {0: [reduced(0, 1)], 1: [replace(reduced(0, 1), kind="all_gather")]}, ("all_reduce", "all_gather"),
    ),
    "other roots": (
        {rank: [replace(reduced(0, 1), kind="broadcast", root=rank)] for rank in range(2)},
        ("root 0", "root 1"),
    ),
    "splits that do not fit": (
        {0: [split((0, 3), (0, 2))], 1: [split((2, 0), (4, 0))]},
        ("collective 0", "rank 0 sends 3 rows to rank 1, which awaits 4"),
    ),
    "a send without its receive": (
        {0: [message("send", 1, None)], 1: []},
        ("message 0 from rank 0 to rank 1", "rank 1 receives nothing"),
    ),
    "a receive without its send": (
        {0: [message("send", 1, None)], 1: [message("recv", 0, None), message("recv", 0, None)]},
        ("message 1 from rank 0 to rank 1", "rank 0 sends nothing"),
    ),
    "a message of another size": (
        {0: [message("send", 1, None)], 1: [replace(message("recv", 0, None), tensors=(TABLE,))]},
        ("message 0 from rank 0 to rank 1", "float32[4]", "float32[8, 2]"),
    ),
    "a ring that sends before it receives": (
        {rank: hop(rank, 3, None) for rank in range(3)},
        ("a circle", "rank 0 waits in its turn 0, send to rank 1",
         "rank 2 waits in its turn 0, send to rank 0"),
    ),
    "a hop before a sum on one rank, after it on the other": (
        {0: [*hop(0, 2, 0), reduced(0, 1)], 1: [reduced(0, 1), *hop(1, 2, 0)]},
        ("a circle", "rank 0 waits in its turn 0, send to rank 1", "rank 1 waits in its turn 0, all_reduce"),
    ),
    "three ranks over three groups": (
        {0: [reduced(0, 1), reduced(0, 2)], 1: [reduced(1, 2), reduced(0, 1)],
         2: [reduced(0, 2), reduced(1, 2)]},
        ("a circle", "on ranks [0, 1] (0-1), for rank 1", "on ranks [1, 2] (1-2), for rank 2",
         "on ranks [0, 2] (0-2), for rank 0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_deadlock_is_found_and_named(name: str) -> None:
    orders, words = WRONG[name]
    fault = order_fault(orders)
    assert fault is not None
    for word in words:
        assert word in fault
