"""What a hidden-state store was made from, and whether that is what a run wants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

Fingerprint = Mapping[str, str]
"""Field (target weights, tokenizer, aux layers, chat template, dtype, documents, ...) to its value or digest.
"""


def require_same(stored: Fingerprint, expected: Fingerprint, where: str, fix: str) -> None:
    """Raises ValueError that lists every field in which the two differ."""
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
    """Where a run looks for the hidden states of this fingerprint, and puts them."""
    identity = json.dumps([dict(fingerprint), dtype], sort_keys=True)
    return Path(cache_dir) / f"hidden-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
