"""The fingerprint of a hidden-state store: what it was made from, compared with what a run expects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

Fingerprint = Mapping[str, str]
"""{field: its value or digest}; fields are for example `target_weights`, `tokenizer` and `aux_layers`."""


def require_same(stored: Fingerprint, expected: Fingerprint, where: str, fix: str) -> None:
    """Check that two fingerprints are equal.

    Raises:
        ValueError: they differ. The message lists every field that does.
    """
    fields = sorted(set(stored) | set(expected))
    different = [
        f"{field}: stored {stored.get(field, 'absent')}, expected {expected.get(field, 'absent')}"
        for field in fields
        if stored.get(field) != expected.get(field)
    ]
    if different:
        raise ValueError(
            f"the hidden states in {where} were captured from something else ({'; '.join(different)}): {fix}"
        )


def store_folder(cache_dir: str | Path, fingerprint: Fingerprint, dtype: str) -> Path:
    """The folder under `cache_dir` of the store with this fingerprint and dtype, whether it exists or not."""
    identity = json.dumps([dict(fingerprint), dtype], sort_keys=True)
    return Path(cache_dir) / f"hidden-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
