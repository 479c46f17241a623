"""The page of `eagle3-ds watch RUN --html FILE` in a browser: light, dark, wide and narrow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.colors import BLUE, ORANGE, SKY, VERMILION
from tests.unit.browser import SCHEMES, Scheme, document, measured, needs_browser, pixels, share
from tests.unit.watched_run import WatchedRun, record

pytestmark = needs_browser
WIDE, NARROW = (1200, 1200), (500, 2400)
GROUND = {"light": "#ffffff", "dark": "#16181c"}
TEXT = {"light": "#111111", "dark": "#e8e8e8"}
CURVES = {"light": (BLUE, VERMILION), "dark": (SKY, ORANGE)}
TROUBLE = {"light": "#b00020", "dark": "#ff8a80"}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred of three hundred steps, of which the third rank did not come back."""
    folder = tmp_path_factory.mktemp("watched")
    run = WatchedRun(folder / "run", "train.steps=300")
    run.state("training")
    run.steps(0, 300)
    for step in range(1, 201):
        loss = 3 + 7 * math.exp(-step / 60)
        held = {"loss": loss + 0.2, "acceptance_length": 1 + step / 120, "step_accuracy": [step / 420]}
        more = {"heldout": held} if step % 30 == 0 else {}
        run.metrics(
            record(step, loss=loss, acceptance_length=1 + step / 100, step_accuracy=[step / 400], **more)
        )
    run.log(0, "attention kernel cpu", "training:  66%|######  | 200/300 [00:06<00:14, loss=7.0]")
    for rank in range(1, 4):
        run.log(rank, host="a-host-with-a-long-name.of.a.large.cluster")
    run.end(2, "raised", f"ValueError: a bad row in {'/a/long/path' * 12}", 200)
    assert main(["watch", str(run.folder), "--once", "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_seen_as_the_reader_wishes(html: Path, scheme: Scheme, tmp_path: Path) -> None:
    picture = pixels(html, scheme, WIDE, tmp_path)
    assert picture.shape == (WIDE[1], WIDE[0], 3)
    assert 0.5 < share(picture, GROUND[scheme], 0) < 0.95, "ground"
    assert share(picture, TEXT[scheme]) > 0.002, "words"
    for colour in (*CURVES[scheme], TROUBLE[scheme]):
        assert share(picture, colour) > 0.0001, colour
    other: Scheme = "light" if scheme == "dark" else "dark"
    assert share(picture, GROUND[other], 0) == 0.0
    assert not any(share(picture, colour) for colour in CURVES[other])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_browser_reads_the_run_from_it(html: Path, scheme: Scheme, tmp_path: Path) -> None:
    body = document(html, scheme, WIDE, tmp_path).partition("<body>")[2]
    for words in (
        "up to 2,048 tokens, mesh draft_dp 1 x ring 2 x ulysses 2",
        "step 200 of 300 (67%), 200,000 tokens",
        "held-out accuracy: 0.4286",
        "raised after step 200, ValueError: a bad row in /a/long/path",
        "attention kernel cpu",
    ):
        assert words in body
    assert body.count("<svg") == body.count("<polyline") == 6 and body.count("<tr") == 5


def test_curves_stand_in_columns_and_nothing_leaves_the_window(html: Path, tmp_path: Path) -> None:
    asked = (
        "({wide: document.documentElement.scrollWidth,"
        " lefts: [...new Set([...document.querySelectorAll('figure')].map(f => f.offsetLeft))].length,"
        " fit: [...document.querySelectorAll('figure')].every(f => f.scrollWidth <= f.clientWidth)})"
    )
    assert measured(html, asked, WIDE, tmp_path) == {"wide": WIDE[0], "lefts": 2, "fit": True}
    of_table = "document.querySelector('.ranks')"
    assert measured(html, f"{of_table}.scrollWidth <= {of_table}.clientWidth", WIDE, tmp_path) is True
    assert measured(html, asked, NARROW, tmp_path) == {"wide": NARROW[0], "lefts": 1, "fit": True}


def test_these_checks_can_fail(tmp_path: Path) -> None:
    """A page that is blank, and light whatever is wished, and one whose script complains."""
    page = tmp_path / "page.html"
    page.write_text("<html><body style='background: #ffffff'></body></html>")
    blank = pixels(page, "dark", (500, 300), tmp_path)
    assert blank.shape == (300, 500, 3) and share(blank, GROUND["light"], 0) == 1.0
    assert share(blank, GROUND["dark"]) == share(blank, TEXT["dark"]) == 0.0
    page.write_text("<html><body><script>console.error('no such thing')</script></body></html>")
    with pytest.raises(AssertionError, match="no such thing"):
        pixels(page, "light", (500, 300), tmp_path)
