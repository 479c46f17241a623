"""What a hidden-state store was made from, and whether that is what a run wants."""

from __future__ import annotations

from collections.abc import Mapping

Fingerprint = Mapping[str, str]
"""Field (target weights, tokenizer, aux layers, chat template, dtype, documents, ...) to its value or digest."""


def require_same(stored: Fingerprint, expected: Fingerprint, where: str, fix: str) -> None:
    """Raises ValueError that lists every field in which the two differ."""
    fields = sorted(set(stored) | set(expected))
    different = [
        f"{field}: stored {stored.get(field, 'absent')}, expected {expected.get(field, 'absent')}"
        for field in fields
        if stored.get(field) != expected.get(field)
    ]
    if different:
        raise ValueError(f"the hidden states in {where} were captured from something else ({'; '.join(different)}): {fix}")
