"""Tokenised conversations on disk: one arrow row per document, the split, the counts, and what happened on
the way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
from safetensors.torch import load_file
from torch import Tensor

from eagle3_ds.data.statistics import DataStatistics

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "document_id": datasets.Value("int64"),
    }
)
"""One document: token ids, True where the assistant wrote the token, and its number over training and
held-out data.
"""
DOCUMENTS_FILE = "documents.arrow"
TABLES_FILE = "tables.safetensors"
STATISTICS_FILE = "statistics.json"
PICTURE_FILE = "lengths.png"


@dataclass(frozen=True)
class PreparedData:
    """The documents of a run.

    `fingerprint` names content and settings; `supervised_counts` is int64 [V] over training documents;
    `required_tokens`, int64 [n], are the special and end tokens that every draft vocabulary holds.
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    statistics: DataStatistics
    supervised_counts: Tensor
    required_tokens: Tensor
    fingerprint: str
    path: Path

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> PreparedData:
        """Read a folder that `prepare_data` wrote; the documents stay memory-mapped.

        Raises:
            ValueError: a file is missing, damaged, or of another version.
        """
        for name in (DOCUMENTS_FILE, TABLES_FILE, STATISTICS_FILE):
            if not (path / name).is_file():
                raise ValueError(
                    f"{path / name} is missing from the prepared data: remove the folder {path} and run again"
                )
        documents = datasets.Dataset.from_file(str(path / DOCUMENTS_FILE))
        tables = load_file(path / TABLES_FILE)
        try:
            statistics = DataStatistics(**json.loads((path / STATISTICS_FILE).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path / STATISTICS_FILE} was written by another version of this program, or is damaged "
                f"({error}): remove the folder {path} and run again"
            ) from error
        train, heldout = (documents.select(tables[name].numpy()) for name in ("train", "heldout"))
        counts, required = tables["supervised_counts"], tables["required_tokens"]
        return cls(train, heldout, statistics, counts, required, fingerprint, path)

    def lengths(self) -> dict[int, int]:
        """{document_id: tokens} of every document, training and held-out: what a hidden-state store has to
        hold.
        """
        return {**document_lengths(self.train), **document_lengths(self.heldout)}


def document_lengths(dataset: datasets.Dataset) -> dict[int, int]:
    """{document_id: tokens} in the order of the rows."""
    columns = dataset.select_columns(["document_id", "loss_mask"]).with_format("arrow")
    lengths: dict[int, int] = {}
    for batch in columns.iter(batch_size=1000):
        lengths.update(zip(batch["document_id"].to_pylist(), map(len, batch["loss_mask"]), strict=True))
    return lengths


def save_statistics(path: Path, statistics: DataStatistics) -> None:
    (path / STATISTICS_FILE).write_text(json.dumps(asdict(statistics), indent=2) + "\n")
