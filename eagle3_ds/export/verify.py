"""Verifying an export: it is read back, and must give the same logits as the draft."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.draft import Draft, VocabularyMap
from eagle3_ds.export.folder import EMBEDDING, read_folder
from eagle3_ds.export.speculators import load_speculators
from eagle3_ds.export.vllm import load_vllm

SEED = 0


@torch.no_grad()
def verify_export(
    folder: str | Path,
    model: Draft,
    vocabulary: VocabularyMap,
    tolerance: float | None = None,
    algorithm: str = "eagle3",
    embedding: Tensor | None = None,
) -> float:
    """Read an export in either layout, and compare its logits on a fixed random input with the draft's.

    Both run in fp32 on the CPU: a float32 export must agree exactly, another one up to the rounding of its
    weights.

    Args:
        model: the served draft, with whole weights.
        tolerance: the largest relative error allowed. None: 0 for a float32 export, else 16 times the epsilon
            of its dtype.
        embedding: [V, H], what the draft was given in training; needed for one that brings it in the vLLM
            layout.

    Returns:
        The relative L2 error of the logits.

    Raises:
        ValueError: the logits, the sizes, the vocabulary map or the draft's own embedding differ.
    """
    config, state, stored = load_export(folder)
    if not (torch.equal(stored.d2t, vocabulary.d2t.cpu()) and torch.equal(stored.t2d, vocabulary.t2d.cpu())):
        raise ValueError(
            f"the export {str(folder)!r} has another vocabulary map than the draft. Export it again."
        )
    known = ALGORITHMS[algorithm]
    if known.layouts["vllm"].brings_embedding(config):
        _check_same_embedding(folder, None if embedding is None else model.read_embedding(embedding))
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    original = known.build(model.config)
    original.load_state_dict(
        {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    )
    exported = known.build(config)
    exported.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    expected, found = known.probe(original, SEED), known.probe(exported, SEED)
    error = (
        float((found - expected).norm() / expected.norm()) if expected.shape == found.shape else float("inf")
    )
    allowed = (
        tolerance if tolerance is not None else 0.0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    )
    if not error <= allowed:
        raise ValueError(
            f"the export {str(folder)!r} gives other logits than the draft: relative error {error:.3g}, "
            f"allowed {allowed:.3g} for {dtype}. Export it again; if it happens again, the layout and the "
            "draft do not belong together."
        )
    return error


def load_embedding(folder: str | Path) -> Tensor:
    """The embedding [V, H] of an export that holds one, on the CPU."""
    return read_folder(folder)[1][EMBEDDING]


def _check_same_embedding(folder: str | Path, embedding: Tensor | None) -> None:
    stored = load_embedding(folder)
    if embedding is None or not torch.equal(stored, embedding.to("cpu", stored.dtype)):
        raise ValueError(
            f"the export {str(folder)!r} has another embedding than the draft was trained with. Export it "
            "again."
        )


def load_export(folder: str | Path) -> tuple[LlamaConfig, dict[str, Tensor], VocabularyMap]:
    """The config of an export in either layout, its whole weights by the draft's names, and its vocabulary
    map, on the CPU.

    Raises:
        ValueError: the folder is no export in either layout, or it is incomplete.
    """
    keys, _ = read_folder(folder)
    return load_speculators(folder)[:3] if "speculators_model_type" in keys else load_vllm(folder)
