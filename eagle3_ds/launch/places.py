"""This machine before anything starts on it: which devices are visible."""

from __future__ import annotations

from collections.abc import Mapping

from eagle3_ds.device.kinds import VISIBLE


def visible_devices(accelerator: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The devices that the environment makes visible, in its order; None when it does not restrict them.

    Raises:
        ValueError: a device is not named by its number, or twice.
    """
    name = VISIBLE.get(accelerator, "")
    text = environ.get(name, "").strip()
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(
            f"{name} is {text!r}, but DeepSpeed's launcher knows devices by their numbers alone. Write "
            f"these, e.g. {name}=0,1, or use --launcher torchrun, which leaves it as it is."
        )
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} is {text!r}, which names a device twice. Name each once.")
    return numbers
