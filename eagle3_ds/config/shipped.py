"""The recipes and DeepSpeed JSONs that come with the package, found by name from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Kind = Literal["recipes", "ds_configs"]
_ENDINGS: dict[Kind, str] = {"recipes": ".yaml", "ds_configs": ".json"}
_PACKAGE = Path(__file__).parents[1]


def shipped(kind: Kind) -> dict[str, Path]:
    """{name: file} of what is shipped, by the alphabet; a name has no ending.

    An installed wheel has the files inside the package (setup.py). A clone and an editable install have them
    beside it, so that there is one copy of each.
    """
    places = (_PACKAGE / "shipped" / kind, _PACKAGE.parent / kind)
    folder = next((place for place in places if place.is_dir()), None)
    files = [] if folder is None else sorted(folder.glob(f"*{_ENDINGS[kind]}"))
    return {path.stem: path for path in files}


def find_shipped(kind: Kind, name: str | Path) -> Path | None:
    """The shipped file of a name, given with or without its ending; None where there is none."""
    return shipped(kind).get(str(name).removesuffix(_ENDINGS[kind]))


def names_near(name: str | Path, names: Iterable[str]) -> str:
    """The names in one line, those first that are like `name`."""
    known = list(names)
    near = difflib.get_close_matches(Path(name).stem, known, n=3, cutoff=0.4)
    return ", ".join([*near, *(other for other in known if other not in near)]) or "none"
