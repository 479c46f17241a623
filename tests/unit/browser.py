"""Pages in a real browser, where one is there: Chromium without a window, started for each page anew."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no program chromium on PATH; on Debian: apt-get install chromium"
)
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
# Chromium's own numbers of what a page is told of the reader's wish.
_WISHES = {"dark": 0, "light": 1}
SECONDS = 60
Pixels = NDArray[np.uint8]


def _ask(
    page: Path, scheme: Scheme, size: tuple[int, int], folder: Path, *options: str
) -> tuple[str, list[str]]:
    """What the browser prints of a page, and the lines of the page's console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={_WISHES[scheme]}",
        f"--window-size={size[0]},{size[1]}",
        *options,
        page.absolute().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]


def pixels(page: Path, scheme: Scheme, size: tuple[int, int], folder: Path) -> Pixels:
    """The page as it is seen: [height, width, 3], red, green and blue from 0 to 255.

    Args:
        size: width and height of the window; below 500 and 200 Chromium paints a part of it only.
        folder: where the browser may write.

    Raises:
        AssertionError: the console of the page has a line.
    """
    picture = folder / "screenshot.png"
    picture.unlink(missing_ok=True)
    _, console = _ask(page, scheme, size, folder, f"--screenshot={picture}")
    assert not console, console
    return np.rint(imread(picture)[:, :, :3] * 255).astype(np.uint8)


def document(page: Path, scheme: Scheme, size: tuple[int, int], folder: Path) -> str:
    """The page's elements as HTML, once it is loaded; arguments and errors are those of `pixels`."""
    dumped, console = _ask(page, scheme, size, folder, "--dump-dom")
    assert not console, console
    return dumped


def measured(page: Path, script: str, size: tuple[int, int], folder: Path) -> Any:
    """What an expression of JavaScript says of the page, as JSON."""
    asking = page.with_name(f"measured-{page.stem}.html")
    asks = f"document.documentElement.dataset.measured = JSON.stringify({script})"
    asking.write_text(f"{page.read_text('utf-8')}<script>{asks}</script>", encoding="utf-8")
    answer = re.search(r'data-measured="([^"]*)"', document(asking, "light", size, folder))
    assert answer is not None
    return json.loads(html.unescape(answer[1]))


def share(picture: Pixels, colour: str, within: int = 8) -> float:
    """The part of a picture that has a colour #rrggbb, each of its three parts give or take `within`."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return float((np.abs(picture.astype(np.int64) - wanted).max(axis=2) <= within).mean())
