"""A rank of nothing but its words: what a supervisor can see of a rank, without the seconds that torch takes
to start.

`python -m fake_rank DEED --status_fd=N` beats ten times a second, then does DEED, as a rank with the given
RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

BEAT_SECONDS = 0.1
STATUS = {
    "phase": "training",
    "step": 7,
    "collective": "gloo:all_reduce number 9 of group 0 on 4",
    "waiting": False,
    "mark": 1,
}


def say(**message: object) -> None:
    os.write(int(sys.argv[-1].partition("=")[2]), json.dumps(message).encode() + b"\n")


def beat(**changes: object) -> None:
    while True:
        say(**{**STATUS, **changes})
        time.sleep(BEAT_SECONDS)


def raises(how_to_leave: str) -> None:
    say(
        error={
            "reason": "ValueError: a bad row",
            "traceback": "Traceback\nValueError: a bad row\n",
            "follows": False,
        }
    )
    if how_to_leave == "stays":
        time.sleep(60)
    sys.exit(1)


def main() -> None:
    deed = sys.argv[1]
    threading.Thread(target=beat, kwargs={"waiting": deed == "waits"}, daemon=True).start()
    time.sleep(3 * BEAT_SECONDS)
    print(f"rank {os.environ.get('RANK')} starts to: {deed}", flush=True)
    if deed == "finishes":
        return
    if deed in ("raises", "stays"):
        raises(deed)
    if deed == "exits":
        print("terminate called without an active exception", file=sys.stderr, flush=True)
        os._exit(3)
    if deed == "dies slowly":
        time.sleep(0.5)
        deed = "SIGKILL"
    if deed in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[deed])
    if deed == "obeys":
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    signal.pause()


if __name__ == "__main__":
    main()
