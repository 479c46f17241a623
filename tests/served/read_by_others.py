"""Loads an export by a package of others and writes the tensors that it has then.

Runs in the environment of `make_environment.sh`: `python read_by_others.py PACKAGE FOLDER TENSORS ...`, any
number of times the last three. A package that refuses an export ends it.
"""

from __future__ import annotations

import sys
from typing import Any

from safetensors.torch import save_file


def load(package: str, folder: str) -> Any:
    """The draft as the package has it: speculators' own entry, SpecForge's as its training resumes."""
    if package == "speculators":
        from speculators import SpeculatorModel

        return SpeculatorModel.from_pretrained(folder)
    from specforge.modeling.auto import AutoDraftModel

    return AutoDraftModel.from_pretrained(folder)


def main(words: list[str]) -> None:
    """Load and write."""
    for package, folder, tensors in zip(words[::3], words[1::3], words[2::3], strict=True):
        state = load(package, folder).state_dict()
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, tensors)


if __name__ == "__main__":
    main(sys.argv[1:])
