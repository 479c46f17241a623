"""The pictures of docs/how-it-works.md are what docs/pictures/draw.py draws, and the text of every picture of
the pages can be read, on a light and on a dark page.
"""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.unit.browser import Pixels, Scheme, measured, needs_browser, pixels, share

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
ALL = sorted(path.name for path in PICTURES.glob("*.svg"))
DRAWN = ("round.svg", "ttt-steps.svg", "mesh.svg", "one-step.svg", "gradients.svg")
SVG = "{http://www.w3.org/2000/svg}"


def drawing():
    """docs/pictures/draw.py, which is no module of a package."""
    spec = spec_from_file_location("draw_pictures", PICTURES / "draw.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def brightness(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it, of #rrggbb."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_what_the_program_draws(name: str) -> None:
    drawn = drawing().PICTURES[name]().svg()
    assert (PICTURES / name).read_text(encoding="utf-8") == drawn, "run python docs/pictures/draw.py"


@pytest.mark.parametrize("name", DRAWN)
def test_text_stays_inside_and_stands_out(name: str) -> None:
    """Text is text, inside the picture, and of a contrast of at least 4.5 to the ground."""
    tree = ElementTree.fromstring((PICTURES / name).read_text(encoding="utf-8"))
    width, height = (float(number) for number in tree.attrib["viewBox"].split()[2:])
    ground = next(tree.iter(f"{SVG}rect"))
    assert (ground.attrib["width"], ground.attrib["height"]) == (f"{width:g}", f"{height:g}")
    words = list(tree.iter(f"{SVG}text"))
    assert len(words) > 15
    for text in words:
        # 0.6 of the size is a wide letter of DejaVu Sans, the widest font that this may be shown in.
        long = 0.6 * float(text.attrib["font-size"]) * len(text.text or "")
        left = (
            float(text.attrib["x"])
            - {"start": 0, "middle": long / 2, "end": long}[text.attrib["text-anchor"]]
        )
        assert left >= 0 and left + long <= width + 8, text.text
        assert 0 < float(text.attrib["y"]) < height, text.text
        contrast = (brightness(ground.attrib["fill"]) + 0.05) / (brightness(text.attrib["fill"]) + 0.05)
        assert contrast >= 4.5, text.text


def test_the_drawn_cut_has_what_its_words_say() -> None:
    module = drawing()
    plan, answer = module.the_plan()
    assert plan.ring == plan.ulysses == 2 and plan.live_per_rank == 8 and plan.slots_per_rank == 12
    assert plan.padded_length == plan.length + 1
    before_answers = [slot for slot in plan.live.ravel() if slot < len(answer) and not answer[slot]]
    assert len(before_answers) == 3 * module.GUESSES
    assert not re.search(r"<(image|foreignObject|script)", "".join((PICTURES / n).read_text() for n in DRAWN))


BEHIND: dict[Scheme, str] = {"light": "#ffffff", "dark": "#0d1117"}
"""Of a page as GitHub shows it."""


def size_of(name: str) -> tuple[int, int]:
    viewed = ElementTree.fromstring((PICTURES / name).read_text(encoding="utf-8")).attrib["viewBox"]
    _, _, width, height = viewed.split()
    return int(width), int(height)


def on_a_page(svg: str, size: tuple[int, int], scheme: Scheme, folder: Path) -> Pixels:
    """A picture as a page shows it that has nothing else."""
    (folder / "picture.svg").write_text(svg, encoding="utf-8")
    page = folder / "page.html"
    page.write_text(
        f"<html><body style='margin: 0; color-scheme: {scheme}; background: {BEHIND[scheme]}'>"
        f"<img src='picture.svg' width='{size[0]}' height='{size[1]}'></body></html>"
    )
    return pixels(page, scheme, size, folder)


def differing(svg: str, size: tuple[int, int], folder: Path) -> float:
    """The part of a picture that is not the same on a light and on a dark page."""
    light, dark = (on_a_page(svg, size, scheme, folder) for scheme in BEHIND)
    return float(np.any(light != dark, axis=2).mean())


@needs_browser
@pytest.mark.parametrize("name", ALL)
def test_a_picture_has_a_ground_of_its_own(name: str, tmp_path: Path) -> None:
    """So that it reads on a dark page as on a light one; only its round corners let the page through."""
    svg, size = (PICTURES / name).read_text(encoding="utf-8"), size_of(name)
    assert differing(svg, size, tmp_path) < 0.001
    seen = on_a_page(svg, size, "dark", tmp_path)
    assert seen.shape == (size[1], size[0], 3)
    assert 0.3 < share(seen, "#ffffff", 0) < 0.95


TEXT_BOXES = """(() => {
  const boxes = found => [...found].map(one => {
    const { left, top, right, bottom } = one.getBoundingClientRect();
    return { text: one.textContent, left, top, right, bottom };
  });
  const all = name => boxes(document.querySelectorAll(`svg ${name}`));
  return { texts: all("text"), rects: all("rect") };
})()"""


def badly_set(svg: str, size: tuple[int, int], folder: Path) -> list[str]:
    """Texts that, in the fonts of this machine, leave the picture or the box that they stand in, or run into
    another text.
    """
    page = folder / "inline.html"
    sized = svg.replace("<svg ", f"<svg width='{size[0]}' height='{size[1]}' ", 1)
    page.write_text(f"<html><body style='margin: 0'>{sized}</body></html>", encoding="utf-8")
    found = measured(page, TEXT_BOXES, size, folder)
    wrong = []
    for place, text in enumerate(found["texts"]):
        around = [box for box in found["rects"] if _holds_middle(box, text)]
        inner = min(around, key=lambda box: (box["right"] - box["left"]) * (box["bottom"] - box["top"]))
        if text["left"] < inner["left"] or text["right"] > inner["right"]:
            wrong.append(f"{text['text']!r} leaves its box")
        wrong += [
            f"{text['text']!r} runs into {other['text']!r}"
            for other in found["texts"][place + 1 :]
            if _overlap(text, other, "left", "right") > 1 and _overlap(text, other, "top", "bottom") > 4
        ]
    return wrong


def _holds_middle(box: dict[str, float], text: dict[str, float]) -> bool:
    x, y = (text["left"] + text["right"]) / 2, (text["top"] + text["bottom"]) / 2
    return box["left"] <= x <= box["right"] and box["top"] <= y <= box["bottom"]


def _overlap(one: dict[str, float], other: dict[str, float], first: str, last: str) -> float:
    return min(one[last], other[last]) - max(one[first], other[first])


@needs_browser
@pytest.mark.parametrize("name", ALL)
def test_no_text_leaves_its_box_or_runs_into_another(name: str, tmp_path: Path) -> None:
    assert badly_set((PICTURES / name).read_text(encoding="utf-8"), size_of(name), tmp_path) == []


@needs_browser
def test_the_checks_of_pictures_can_fail(tmp_path: Path) -> None:
    size = (500, 200)
    head = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 500 200' font-size='14'>"
    bare = f"{head}<text x='10' y='40'>black on the page</text></svg>"
    assert differing(bare, size, tmp_path) > 0.9
    crowded = (
        f"{head}<rect width='500' height='200' fill='#ffffff'/>"
        "<rect x='10' width='60' height='30' fill='none'/><text x='20' y='20'>too long for it</text>"
        "<text x='20' y='70'>first</text><text x='25' y='74'>second</text></svg>"
    )
    assert badly_set(crowded, size, tmp_path) == [
        "'too long for it' leaves its box",
        "'first' runs into 'second'",
    ]
    assert differing(crowded, size, tmp_path) == 0.0
