"""Where rows come from: JSONL, JSON and Parquet files, folders of them, data sets of the hub or saved to
disk, and the words of `CORPORA`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import datasets

from eagle3_ds.data.corpora import CORPORA
from eagle3_ds.data.shapes import Shape, recognise_shape

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
DOCUMENTS = (".json", ".json.gz", ".json.zst")
"""Files of one JSON array of rows. Many hold a row per line all the same."""
SUFFIXES = (*LINES, *DOCUMENTS, ".parquet")
READABLE = ".jsonl, .json (either as .gz or .zst too) and .parquet"
PROBED = 100
"""Rows that are looked at for the shape of a source."""
SAVED = ("state.json", "dataset_info.json")
"""Files of a folder that `datasets` saved by `save_to_disk`."""
SPLITS = "dataset_dict.json"
"""File of a folder of several such folders, one for each split."""
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
            fix = (
                "the file looks like one JSON array: name it .json"
                if self.content.lstrip().startswith(b"[")
                else "every line holds one JSON object"
            )
            raise ValueError(f"{self.place}: not valid JSON ({error}): {fix}") from error


def expand_sources(entries: Sequence[str] | None, field: str) -> list[str]:
    """The sources behind the entries of the recipe's `field`: folders opened in sorted order, the others as
    they stand.

    Raises ValueError for no entries at all (None), and for an entry that does not exist, has another suffix,
    is named twice, or is a folder without data.
    """
    words = " or ".join(map(repr, CORPORA))
    if entries is None:
        raise ValueError(
            f"{field}: required and not given. Name the conversations to train on: files, folders, data sets "
            f"of the hub, {words} (docs/recipe.md). Only a RolloutTrainer needs none."
        )
    files: list[str] = []
    for index, entry in enumerate(entries):
        place = f"{field}[{index}] is {entry!r}"
        path = Path(entry)
        if entry in CORPORA or is_hub_name(entry):
            found = [entry]
        elif path.is_dir():
            found = _open_folder(path, place)
        elif not path.is_file():
            raise ValueError(
                f"{place}, which does not exist: name a .jsonl, .json or .parquet file, a folder of them, a "
                f"data set of the hub (owner/name, owner/name:split), {words}"
            )
        elif not entry.endswith(SUFFIXES):
            raise ValueError(
                f"{place}, a file of type {path.suffix!r}: only {READABLE} can be read; convert it"
            )
        else:
            found = [entry]
        twice = set(found) & set(files)
        if twice:
            raise ValueError(f"{place}, and {sorted(twice)[0]} is named already: name every file once")
        files += found
    return files


def _open_folder(folder: Path, place: str) -> list[str]:
    """The files and the data sets saved by `datasets` within a folder; the folder itself when it is one."""
    found: list[str] = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        if any(saved in map(str, path.parents) for saved in found):
            continue  # it belongs to a saved data set
        if (path / SPLITS).is_file():
            splits = [name for name in sorted(path.iterdir()) if is_saved(name)]
            raise ValueError(
                f"{place}, and {path} holds the splits of a data set: name the folder of the split that is "
                f"meant ({', '.join(map(str, splits)) or 'none is there'})"
            )
        if is_saved(path) or path.is_file() and path.name.endswith(SUFFIXES) and _holds_rows(path):
            found.append(str(path))
    if not found:
        raise ValueError(
            f"{place}, a folder without any file of {READABLE}, and no data set that was saved to disk: name "
            "the folder that holds the data"
        )
    return found


def is_saved(folder: str | Path) -> bool:
    """Whether `datasets` saved a data set into this folder by `save_to_disk`."""
    return all((Path(folder) / name).is_file() for name in SAVED)


def _holds_rows(file: Path) -> bool:
    """False for a .json file that describes others: it holds neither an array nor a row in its first line."""
    first = _first_line(str(file)) if file.name.endswith(DOCUMENTS) else b"["
    return first.startswith(b"[") or _is_object(first)


def _first_line(file: str) -> bytes:
    return next((line.strip() for _, line in _read_lines(file)), b"")


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object, as the first one is in a file of a row per line."""
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_hub_name(entry: str) -> bool:
    """Whether the entry names a data set of the hub: neither a path here nor one that was meant to be."""
    path = Path(entry)
    # "data/chats" looks like a hub name too: an existing first part tells that a folder was meant
    return (
        bool(HUB_NAME.fullmatch(entry))
        and not entry.endswith(SUFFIXES)
        and not path.exists()
        and not Path(path.parts[0]).exists()
    )


def source_fingerprint(source: str) -> str:
    """sha256 of what the source holds."""
    if source in CORPORA:
        return CORPORA[source].fingerprint()
    loaded = is_hub_name(source) or is_saved(source)
    files = [file["filename"] for file in _load(source).cache_files] if loaded else [source]
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
    """The shape of a source, by its first row that has one unless it is given, and its rows; no shape where
    there is no row.

    The rows of a file share one shape. JSONL is handed out line by line, not in one common schema: messages
    may carry keys that others lack. Raises the ValueError of the first row when none of the first rows has a
    shape.
    """
    rows = _read(source)
    seen: list[tuple[str, bytes | Mapping[str, Any]]] = []
    known, fault = shape, None
    for place, content in itertools.islice(rows, PROBED):
        seen.append((place, content))
        try:
            known = shape or recognise_shape(Row(place, "messages", content).value(), place)
            break
        except ValueError as error:  # a bad row, to be told with the others
            fault = fault or error
    if not seen:
        return None, iter(())
    if known is None:
        assert fault is not None
        raise fault
    own = known
    return own, (Row(place, own, content) for place, content in itertools.chain(seen, rows))


def _read(source: str) -> Iterator[tuple[str, bytes | Mapping[str, Any]]]:
    """(place, content) of every row, counted from 1."""
    if source in CORPORA:
        rows: Any = CORPORA[source].conversations()
    elif is_hub_name(source) or is_saved(source):
        data = _load(source)
        rows = (without_nulls(row, data.features) for row in data)
    elif source.endswith(LINES) or source.endswith(DOCUMENTS) and _is_object(_first_line(source)):
        yield from _read_lines(source)
        return
    elif source.endswith(DOCUMENTS):
        rows = _read_document(source)
    else:
        rows = _read_parquet(source)
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def without_nulls(value: Any, feature: Any) -> Any:
    """A value of an Arrow column without the nulls in its structs.

    Arrow gives every row's struct the keys of all rows, null where a row lacks one; a template would print
    them. JSON columns, text, and members of lists stay as they are.
    """
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {
            key: without_nulls(inner, feature.get(key)) for key, inner in value.items() if inner is not None
        }
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_nulls(member, inner) for member in value]
    return value


def _read_lines(file: str) -> Iterator[tuple[str, bytes]]:
    try:
        with _open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}, line {number}", line
    except _damage() as error:
        raise _broken(file, error) from error
    except OSError as error:
        raise _vanished(file, error) from error


def _read_document(file: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON array, or the one row that the file is."""
    try:
        with _open_bytes(file) as stream:
            value = json.loads(stream.read())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(file, error) from error
    except _damage() as error:
        raise _broken(file, error) from error
    except OSError as error:
        raise _vanished(file, error) from error
    yield from value if isinstance(value, list) else [value]


def _open_bytes(file: str) -> IO[bytes]:
    """The file's bytes, unpacked where its name says that they are packed."""
    if file.endswith(".gz"):
        return cast(IO[bytes], gzip.open(file, "rb"))
    if not file.endswith(".zst"):
        return open(file, "rb")  # noqa: SIM115 - the caller closes it
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise ValueError(
            f"{file} is packed by Zstandard, which needs the package zstandard: `pip install zstandard`, or "
            "unpack the file (`zstd -d`)"
        ) from error
    return io.BufferedReader(zstandard.open(file, "rb"))


def _damage() -> tuple[type[Exception], ...]:
    """What unpackers raise on a file that is not what its name says, or is cut."""
    zstandard = sys.modules.get("zstandard")  # loaded by now, if it was needed
    own: type[Exception] = getattr(zstandard, "ZstdError", EOFError)
    return EOFError, zlib.error, gzip.BadGzipFile, own


def _read_parquet(file: str) -> Iterator[Mapping[str, Any]]:
    if not Path(file).is_file():
        raise _vanished(file, FileNotFoundError("no such file"))
    try:
        rows = datasets.load_dataset("parquet", data_files=[file], split="train", streaming=True)
        for row in rows:
            yield without_nulls(row, rows.features)
    except (ValueError, datasets.exceptions.DatasetGenerationError, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}. Write the file again") from error


def _broken(file: str, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read: {error}. Write the file again")


def _vanished(file: str, error: OSError) -> ValueError:
    return ValueError(
        f"{file} was there and cannot be read any more ({error}): put it back, or take it out of the "
        "recipe's data"
    )


def _load(entry: str) -> datasets.Dataset:
    """A data set that was saved to disk, or one of the hub: downloaded once, then from the cache of
    `datasets`. Memory-mapped.
    """
    if is_saved(entry):
        try:
            return datasets.load_from_disk(entry)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{entry} cannot be read as a saved data set: {error}. Save it again") from error
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
