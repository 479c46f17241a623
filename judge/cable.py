"""A simulated network cable between two network namespaces, with delay, loss, or a cut.

Linux's netem does the same, but is a kernel module that many machines lack. Here each end of the cable is a
TUN device, and a thread carries packets from one to the other.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

CLONE = Path("/dev/net/tun")
MTU = 16384
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000


@dataclass
class Cable:
    """Carries packets between the devices `names` until it is closed. Its faults may change at any time.

    Attributes:
        delay: seconds that a packet takes in one direction.
        loss: share of the packets that are dropped at random.
        cut: whether all packets are dropped.
    """

    names: tuple[str, str]
    delay: float = 0.0
    loss: float = 0.0
    cut: bool = False
    lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ends = [_open_device(name) for name in self.names]
        self._closing, self._close = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._close, b".")
        self._thread.join()
        for fd in (*self._ends, self._closing, self._close):
            os.close(fd)

    def _carry(self) -> None:
        chance = random.Random(0)
        on_the_way: list[tuple[float, int, int, bytes]] = []
        count = 0
        while True:
            timeout = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
            ready, _, _ = select.select([*self._ends, self._closing], [], [], timeout)
            if self._closing in ready:
                return
            for side, fd in enumerate(self._ends):
                if fd in ready:
                    packet = os.read(fd, MTU + 64)
                    if self.cut or chance.random() < self.loss:
                        self.lost += 1
                        continue
                    count += 1
                    heapq.heappush(on_the_way, (time.monotonic() + self.delay, count, 1 - side, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, _, side, packet = heapq.heappop(on_the_way)
                _deliver(self._ends[side], packet)


def _open_device(name: str) -> int:
    fd = os.open(CLONE, os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    return fd


def _deliver(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:
        # The host at this end is not up: its packets are lost, as on a real cable.
        return
