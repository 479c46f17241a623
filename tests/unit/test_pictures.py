"""The pictures of docs/how-it-works.md are what docs/pictures/draw.py draws, and their text can be read."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
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
