"""The frozen embedding of a draft that is narrower or wider than its target.

It is made once, from the target's, and then is a file of the run, which ranks, evaluation and export read. It
is not made again anywhere: on another machine, directions of nearly equal weight come out turned against each
other.

Legend: V vocabulary, H hidden size of the draft, Ht the target's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DRAFT_EMBEDDING = "draft-embedding.safetensors"
_NAME = "embed_tokens.weight"
ROWS_AT_ONCE = 2**14


@torch.no_grad()
def project_embedding(embedding_VHt: Tensor, hidden_size: int) -> Tensor:
    """[V, Ht] -> [V, H] in the same dtype, such that scalar products of rows change as little as they can.

    Wider: zeros are appended. Narrower: the coordinates along the H directions that hold most of the squared
    length of all rows (the leading right singular vectors, not centred), times one factor that keeps the root
    mean square length of the rows. Each direction points where its largest component is positive.
    """
    width = embedding_VHt.shape[1]
    if hidden_size >= width:
        return torch.nn.functional.pad(embedding_VHt, (0, hidden_size - width))
    pieces = embedding_VHt.split(ROWS_AT_ONCE)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for piece in pieces:
        gram.addmm_(piece.double().T, piece.double())
    lengths, vectors = torch.linalg.eigh(gram)  # ascending
    directions = vectors[:, -hidden_size:].flip(1)
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    kept = lengths[-hidden_size:].clamp(min=0).sum()
    factor = (lengths.clamp(min=0).sum() / kept).sqrt() if kept > 0 else 1.0
    return torch.cat([(piece.double() @ directions * factor).to(embedding_VHt.dtype) for piece in pieces])


def save_draft_embedding(embedding: Tensor, folder: str | Path) -> Path:
    """Put a draft's own embedding [V, H] into a run's folder, whole or not at all; returns the file."""
    aside = Path(folder) / f".{DRAFT_EMBEDDING}"
    save_file({_NAME: embedding.detach().cpu().contiguous()}, aside)
    return aside.rename(Path(folder) / DRAFT_EMBEDDING)


def load_draft_embedding(folder: str | Path, shape: tuple[int, int]) -> Tensor:
    """The draft's own embedding, of `shape` [V, H], from a run's folder.

    Raises:
        ValueError: there is none, or it is another draft's.
    """
    file = Path(folder) / DRAFT_EMBEDDING
    if not file.is_file():
        raise ValueError(
            f"output_dir: {folder} has no {DRAFT_EMBEDDING}, the embedding of a draft whose hidden_size is "
            "not the target's. `eagle3-ds prepare` writes it for a fresh run; for a run that has trained, "
            "restore it."
        )
    embedding = load_file(file)[_NAME]
    if tuple(embedding.shape) != shape:
        raise ValueError(
            f"output_dir: {file} is an embedding of {list(embedding.shape)}, the draft needs {list(shape)}. "
            "It belongs to another draft.hidden_size or target: choose another output_dir, or restore it."
        )
    return embedding
