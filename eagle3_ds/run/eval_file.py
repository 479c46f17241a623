"""eval.json of a run: what was measured of its weights, in process and on a server.

Both parts carry a digest of the weights they were measured of. A part of other weights is not read: its
figures would be told of a draft that they are not of.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
FILE, SERVED, DIGEST = "eval.json", "served", "weights_sha256"
WEIGHTS = "draft-final.safetensors"
BLOCK = 2**24


def read_eval(folder: Path) -> dict[str, Any]:
    """The content of eval.json as far as it is of the run's weights; empty without one. A part of other
    weights is left out, which is logged. Without weights in the folder all of it counts.
    """
    file = folder / FILE
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    served = content.pop(SERVED, None)
    found = {}
    if content and _is_of_weights(folder, content, "the evaluation in process"):
        found = content
    if served is not None and _is_of_weights(folder, served, "what a server measured"):
        found[SERVED] = served
    return found


def write_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Write what was evaluated in process, beside a server's figures of the same weights."""
    kept = {name: part for name, part in read_eval(folder).items() if name == SERVED}
    _write(folder, {**result, DIGEST: weights_digest(folder), **kept})


def add_served(folder: Path, served: dict[str, Any]) -> None:
    """Put a server's figures into eval.json, beside those of an evaluation of the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {**read_eval(folder), SERVED: {**served, DIGEST: weights_digest(folder)}})


def weights_digest(folder: Path) -> str | None:
    """sha256 of the trained weights in a run's folder; None where there are none."""
    if not (folder / WEIGHTS).is_file():
        return None
    digest = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_of_weights(folder: Path, part: dict[str, Any], name: str) -> bool:
    digest = weights_digest(folder)
    if digest is None or part.get(DIGEST) == digest:
        return True
    logger.warning("%s: %s is of other weights than those that are there, and left out", folder / FILE, name)
    return False


def _write(folder: Path, content: dict[str, Any]) -> None:
    """Write eval.json, whole or not at all."""
    aside = folder / f".{FILE}"
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, folder / FILE)
