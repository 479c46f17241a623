"""A worker extension for vLLM that takes a new draft into a running engine: it runs inside the server.

The server's environment has none of our packages, so this file imports vLLM, torch, safetensors and the
standard library alone. Give it to vLLM as a module on PYTHONPATH, by the option `worker_extension_cls`; then
every worker has the method `load_draft`, for `LLM.collective_rpc`, `AsyncLLM.collective_rpc` or the HTTP
endpoint `/collective_rpc` (docs/rl.md). The weights come in a file that all workers see, with a version and
the names of an export in vLLM's layout; each worker takes its own share of them, as at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DRAFT_FORMAT = "eagle3_ds draft 1"
NOT_IN_THE_MODEL = ("t2d",)
"""Tensors of an export that vLLM does not keep."""


class DraftLoader:
    """Methods for vLLM's workers; vLLM adds the class to the bases of its own worker."""

    draft_version_loaded: int | None = None

    def load_draft(self, path: str) -> int:
        """Load the draft in a file into the engine that runs. Nothing is changed unless all of it fits.

        The target, the cache of keys and values, and requests under way stay: the tokens that are answered
        are the target's by any draft. vLLM calls this between two steps.

        Returns:
            The file's version, which `draft_version` tells from then on.

        Raises:
            ValueError: the file is none of this format, is not newer than the draft that runs, or does not
                have exactly the tensors of this draft in their shapes.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        worker: Any = self
        model = worker.model_runner.get_draft_model()
        speculative = worker.vllm_config.speculative_config
        if model is None or speculative is None or speculative.draft_model_config is None:
            raise ValueError("load_draft: this engine runs without a draft; start it with one of this shape")
        about, shapes = _header(path)
        version = _newer_version(about, self.draft_version_loaded, path)
        _require_same_names(shapes, _header_of_draft(speculative.draft_model_config.model), path)
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in shapes}
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            # As vLLM's own weight update of drafts does: layers get their weights in the form of the
            # checkpoint, are processed as at the start, and keep their memory, which graphs refer to.
            initialize_layerwise_reload(model)
            model.load_weights(weights.items())
            finalize_layerwise_reload(model, speculative.draft_model_config)
        self.draft_version_loaded = version
        return version

    def draft_version(self) -> int | None:
        """The version of the draft that `load_draft` loaded last; None for the one that vLLM started with."""
        return self.draft_version_loaded


def _header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """What a safetensors file says of itself, and the shapes of its tensors."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return dict(file.metadata() or {}), {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _header_of_draft(folder: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the draft's folder that the engine was started with."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"load_draft: the engine was started with the draft {folder!r}, which is no folder with "
            "safetensors here: start it from an export of this draft, on a disk that the workers see"
        )
    for file in files:
        shapes |= _header(file)[1]
    return shapes


def _newer_version(about: Mapping[str, str], loaded: int | None, path: str) -> int:
    """The version of a file, which must be above the one that runs."""
    if about.get("format") != DRAFT_FORMAT or not about.get("version", "").isdecimal():
        raise ValueError(
            f"load_draft: {path} is of format {about.get('format')!r} and version "
            f"{about.get('version')!r}, expected {DRAFT_FORMAT!r} and a number: write it by "
            "RolloutTrainer.write_draft"
        )
    version = int(about["version"])
    if loaded is not None and version <= loaded:
        raise ValueError(
            f"load_draft: {path} has version {version}, and version {loaded} runs: write drafts with "
            "rising versions"
        )
    return version


def _require_same_names(
    given: Mapping[str, Sequence[int]], started: Mapping[str, Sequence[int]], path: str
) -> None:
    """Raises ValueError when a tensor is missing, is too many or has another shape than at the start."""
    problems = [
        f"{name} is {given.get(name, 'missing')}, expected {started.get(name, 'no such tensor')}"
        for name in sorted({*given, *started})
        if name not in NOT_IN_THE_MODEL and given.get(name) != started.get(name)
    ]
    if problems:
        raise ValueError(
            f"load_draft: {path} is not of the draft that this engine was started with: "
            f"{'; '.join(problems[:5])} ({len(problems)} tensors differ). Start the engine with an export of "
            "this draft"
        )
