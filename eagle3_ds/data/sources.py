"""Where conversations come from: JSONL and Parquet files, folders of them, and the word `stdlib`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_fingerprint

STDLIB = "stdlib"
SUFFIXES = (".jsonl", ".parquet")


def expand_sources(entries: Sequence[str], field: str) -> list[str]:
    """The files behind the entries of the recipe's `field`, folders opened in sorted order; `stdlib` stays as it is.

    Raises ValueError for an entry that does not exist, has another suffix, is named twice, or is a folder without data.
    """
    files: list[str] = []
    for index, entry in enumerate(entries):
        place = f"{field}[{index}] is {entry!r}"
        path = Path(entry)
        if entry == STDLIB:
            found = [STDLIB]
        elif path.is_dir():
            found = [str(file) for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
            if not found:
                raise ValueError(f"{place}, a folder without any .jsonl or .parquet file: name the folder that holds the data")
        elif not path.is_file():
            raise ValueError(f"{place}, which does not exist: name a .jsonl or .parquet file, a folder of them, or 'stdlib'")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{place}, a file of type {path.suffix!r}: only .jsonl and .parquet can be read; convert it")
        else:
            found = [entry]
        twice = set(found) & set(files)
        if twice:
            raise ValueError(f"{place}, and {sorted(twice)[0]} is named already: name every file once")
        files += found
    return files


def source_fingerprint(file: str) -> str:
    """sha256 of what the file holds."""
    if file == STDLIB:
        return stdlib_fingerprint()
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def read_rows(file: str) -> Iterator[tuple[str, Any]]:
    """(place, row) for every row of a source, counted from 1; the place opens the error messages about the row."""
    if file == STDLIB:
        for number, row in enumerate(stdlib_conversations(), 1):
            yield f"{STDLIB}, row {number}", row
    elif file.endswith(".parquet"):
        try:
            table = datasets.load_dataset("parquet", data_files=[file], split="train", streaming=True)
            for number, row in enumerate(table, 1):
                yield f"{file}, row {number}", row
        except (ValueError, datasets.exceptions.DatasetGenerationError, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}. Write the file again") from error
    else:
        yield from _read_jsonl(file)


def _read_jsonl(file: str) -> Iterator[tuple[str, Any]]:
    """Rows as they stand, not in one common schema: messages may carry keys that others lack."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield f"{file}, row {number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error}): every line holds one JSON object") from error
