"""Where rows come from: JSONL and Parquet files, folders of them, data sets of the hub, and the word
`stdlib`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from eagle3_ds.data.shapes import Shape, recognise_shape
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_fingerprint

STDLIB = "stdlib"
SUFFIXES = (".jsonl", ".parquet")
HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?",
    flags=re.ASCII,
)
"""owner/name, then /config and :split where the data set has several."""


class Row(NamedTuple):
    """One row. `place` ("file, line n") opens the errors about it; `content` in bytes is a line of JSON, not
    yet read.
    """

    place: str
    shape: Shape
    content: bytes | Mapping[str, Any]

    def value(self) -> Any:
        """The row's keys and values. Raises ValueError for a line that is not JSON."""
        if not isinstance(self.content, bytes):
            return self.content
        try:
            return json.loads(self.content)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(
                f"{self.place}: not valid JSON ({error}): every line holds one JSON object"
            ) from error


def expand_sources(entries: Sequence[str], field: str) -> list[str]:
    """The sources behind the entries of the recipe's `field`: folders opened in sorted order, the others as
    they stand.

    Raises ValueError for an entry that does not exist, has another suffix, is named twice, or is a folder
    without data.
    """
    files: list[str] = []
    for index, entry in enumerate(entries):
        place = f"{field}[{index}] is {entry!r}"
        path = Path(entry)
        if entry == STDLIB or is_hub_name(entry):
            found = [entry]
        elif path.is_dir():
            found = [
                str(file) for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()
            ]
            if not found:
                raise ValueError(
                    f"{place}, a folder without any .jsonl or .parquet file: name the folder that holds the "
                    "data"
                )
        elif not path.is_file():
            raise ValueError(
                f"{place}, which does not exist: name a .jsonl or .parquet file, a folder of them, a data "
                "set of the hub (owner/name, owner/name:split) or 'stdlib'"
            )
        elif path.suffix not in SUFFIXES:
            raise ValueError(
                f"{place}, a file of type {path.suffix!r}: only .jsonl and .parquet can be read; convert it"
            )
        else:
            found = [entry]
        twice = set(found) & set(files)
        if twice:
            raise ValueError(f"{place}, and {sorted(twice)[0]} is named already: name every file once")
        files += found
    return files


def is_hub_name(entry: str) -> bool:
    """Whether the entry names a data set of the hub: neither a path here nor one that was meant to be."""
    path = Path(entry)
    # "data/chats" looks like a hub name too: an existing first part tells that a folder was meant
    return (
        bool(HUB_NAME.fullmatch(entry))
        and path.suffix not in SUFFIXES
        and not path.exists()
        and not Path(path.parts[0]).exists()
    )


def source_fingerprint(source: str) -> str:
    """sha256 of what the source holds."""
    if source == STDLIB:
        return stdlib_fingerprint()
    files = (
        [source] if not is_hub_name(source) else [file["filename"] for file in _load_hub(source).cache_files]
    )
    digest = hashlib.sha256()
    try:
        for file in files:
            with open(file, "rb") as stream:
                while chunk := stream.read(2**22):
                    digest.update(chunk)
    except OSError as error:
        raise _vanished(source, error) from error
    return digest.hexdigest()


def open_source(source: str, shape: Shape | None) -> tuple[Shape | None, Iterator[Row]]:
    """The shape of a source, by its first row unless it is given, and its rows; no shape where there is no
    row.

    The rows of a file share one shape. JSONL is handed out line by line, not in one common schema: messages
    may carry keys that others lack.
    """
    rows = _read(source)
    first = next(rows, None)
    if first is None:
        return None, iter(())
    place, content = first
    known = shape or recognise_shape(Row(place, "messages", content).value(), place)
    return known, (Row(place, known, content) for place, content in itertools.chain([first], rows))


def _read(source: str) -> Iterator[tuple[str, bytes | Mapping[str, Any]]]:
    """(place, content) of every row, counted from 1."""
    if source == STDLIB:
        rows: Any = stdlib_conversations()
    elif is_hub_name(source):
        rows = _load_hub(source)
    elif source.endswith(".jsonl"):
        yield from _read_lines(source)
        return
    else:
        rows = _read_parquet(source)
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _read_lines(file: str) -> Iterator[tuple[str, bytes]]:
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}, line {number}", line
    except OSError as error:
        raise _vanished(file, error) from error


def _read_parquet(file: str) -> Iterator[Mapping[str, Any]]:
    if not Path(file).is_file():
        raise _vanished(file, FileNotFoundError("no such file"))
    try:
        yield from datasets.load_dataset("parquet", data_files=[file], split="train", streaming=True)
    except (ValueError, datasets.exceptions.DatasetGenerationError, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}. Write the file again") from error


def _vanished(file: str, error: OSError) -> ValueError:
    return ValueError(
        f"{file} was there and cannot be read any more ({error}): put it back, or take it out of the "
        "recipe's data"
    )


def _load_hub(entry: str) -> datasets.Dataset:
    """A data set of the hub, memory-mapped: downloaded once, then from the cache of `datasets`."""
    found = HUB_NAME.fullmatch(entry)
    assert found is not None
    try:
        return datasets.load_dataset(found["name"], found["config"], split=found["split"] or "train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{entry!r} is no file here, and could not be loaded from the hub ({error}): correct it "
            "(owner/name/config:split; without a split it is 'train'), or download the data and name the "
            "files"
        ) from error
