"""A random target small enough to be built for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eagle3_ds.config import TargetBuild, TargetSection
from eagle3_ds.targets import build_target

TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * 4 for n in range(30)]
CONVERSATIONS = [
    [{"role": "user", "content": f"What is f{n}?"}, {"role": "assistant", "content": f"It adds {n} to x."}]
    for n in range(30)
]


def tiny_build(seed: int = 0, steps: int = 0, **changes: Any) -> TargetBuild:
    sizes: dict[str, Any] = {
        "learning_rate": 1e-2,
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 7,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 512,
        "sequence_length": 32,
        "batch_size": 4,
    }
    return TargetBuild(**{**sizes, "seed": seed, "steps": steps, **changes})


def build_tiny_target(path: Path, seed: int = 0, steps: int = 0) -> Path:
    """Seven layers, 32 wide, GQA 4/2; `steps` 0 leaves it random."""
    section = TargetSection(path=str(path), build=tiny_build(seed, steps))
    return build_target(section, TEXTS, CONVERSATIONS, progress=False)
