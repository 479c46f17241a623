"""How the tests are shared out where pytest-xdist runs them in two processes (`./launch.sh test` does).

Tests that start processes of their own stay together and follow one another, because two of them at once
would measure each other; the tests of a file stay together, because they share what it has made.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

# A machine that does other work beside the tests is slow now and then, which says nothing of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: two threads in each of two processes wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Optional, because without pytest-xdist there is no such hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        """Hands out what `_split_scope` names alike to one process."""

        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.startswith("tests/unit/") else "several processes"

    return Shared(config, log)
