"""How the tests are shared out where pytest-xdist runs them in two processes (`./launch.sh test` does).

Tests that start processes of their own stay together and follow one another, because two of them at once
would measure each other; the tests of a file stay together, because they share what it has made.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: two threads in each of two processes wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# First, because pytest-xdist reads the groups in a hook of this name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder, *rest = item.path.relative_to(FOLDER).parts
        item.add_marker(pytest.mark.xdist_group(rest[-1] if folder == "unit" else "several processes"))
