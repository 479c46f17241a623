"""Reading the offline hidden-state files of other trainers.

For a target of n layers, by default:

| written by | files | aux: inputs of layers | last state |
|---|---|---|---|
| SpecForge `prepare_hidden_states.py` | `rows_0-2000/data_0.ckpt[.gz]` | 2, n // 2, n - 3 | after the norm |
| speculators >= 0.5 `generate-offline-data` | `hidden_states/hs_0.*` | 2, n // 2, n - 3 | before it |
| speculators 0.3, 0.4 | `data_0.pt`, `data_config.json` | 3, n // 2 + 1, n - 2 | before it |

All have one row per token, and nothing is shifted: token, mask and states of a row belong to the same
position. SpecForge counts layers by their outputs: its 1, n // 2 - 1, n - 4 are the inputs above. speculators
0.3 and 0.4 count likewise, but take 2, n // 2, n - 3, so their states are one layer later. Only they record,
in data_config.json, which layers were captured.

Pickled files are loaded with `weights_only=True`, so that no code in them runs.

Legend: L tokens of a sample, W width of a part of the aux row, A = layers * Ht, Ht hidden size of the target.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MOST_LAYERS = 8
SCALES = "hidden_states_scales"
AuxLayers = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation and its hidden states, memory-mapped where the file allows it.

    Attributes:
        place: the file, for messages.
        token_ids: int64 [L].
        loss_mask: bool [L].
        aux_parts: tensors [L, W]; concatenated they are the aux rows [L, A].
        last: [L, Ht], the last hidden state, before or after the final norm (`last_is_normed`).
        padding: how many rows at the end of the file were left out as padding.
    """

    place: str
    token_ids: Tensor
    loss_mask: Tensor
    aux_parts: tuple[Tensor, ...]
    last: Tensor
    padding: int = 0

    def states(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop): aux [stop - start, A] and the last hidden state [stop - start, Ht]."""
        return torch.cat([part[start:stop] for part in self.aux_parts], dim=-1), self.last[start:stop]


class ForeignFiles(Protocol):
    """The samples of a folder.

    Attributes:
        writer: which program wrote them, for messages.
        last_is_normed: whether `Sample.last` is the output of the target's final norm.
    """

    writer: str
    last_is_normed: bool

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample | None:
        """Sample number `index`; None when its hidden states were not written.

        Raises:
            ValueError: the file is damaged.
        """

    def aux_layers(self, num_layers: int) -> AuxLayers:
        """The layers whose inputs the aux states are, for a target of `num_layers`: as the files record them,
        else their writer's default.

        Raises:
            ValueError: the record is damaged, or names layers that a draft cannot use.
        """


def open_foreign(folder: Path, hidden_states: Path | None = None) -> ForeignFiles:
    """Recognise which program wrote the files in `folder`, and open them.

    Args:
        hidden_states: the folder of `hs_*.safetensors`; None: it is inside the data set of speculators.

    Raises:
        ValueError: there is no such folder, or it has no files of a known kind.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--from {folder}: there is no such folder. Name the one that holds the files to import."
        )
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return SpeculatorsFiles(folder, hidden_states or folder / "hidden_states")
    if hidden_states is not None:
        raise ValueError(
            f"--hidden-states goes with a data set that speculators prepared, and {folder} holds none. "
            "Remove it."
        )
    checkpoints = _numbered(folder.rglob("data_*.ckpt*"), r"data_(\d+)\.ckpt(\.gz)?")
    if checkpoints:
        return SpecForgeFiles(checkpoints)
    pickles = _numbered(folder.glob("data_*.pt"), r"data_(\d+)\.pt")
    if pickles:
        return SpeculatorsPickles(folder, pickles)
    raise ValueError(
        f"--from {folder}: there are neither files of SpecForge (rows_*/data_*.ckpt), nor a data set of "
        "speculators (dataset_info.json and hidden_states/hs_*.safetensors), nor files of speculators 0.3 "
        "or 0.4 (data_*.pt). Name the folder that --output-path or --output named."
    )


def _numbered(paths: Any, pattern: str) -> list[Path]:
    """The paths whose names match, ordered by the number in the name.

    Raises:
        ValueError: two paths have the same number.
    """
    found: dict[int, Path] = {}
    for path in paths:
        match = re.fullmatch(pattern, path.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise ValueError(f"{path} and {found[number]} are the same sample: remove one of them")
        found[number] = path
    return [found[number] for number in sorted(found)]


class SpecForgeFiles:
    """One pickled file per sample: input_ids [L], loss_mask [L], aux_hidden_state [1, L, 3 * Ht],
    hidden_state [1, L, Ht].
    """

    writer = "SpecForge prepare_hidden_states"
    last_is_normed = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def aux_layers(self, num_layers: int) -> AuxLayers:
        return (2, num_layers // 2, num_layers - 3)

    def sample(self, index: int) -> Sample:
        path = self.paths[index]
        content = _load_pickle(path, ("input_ids", "loss_mask", "aux_hidden_state", "hidden_state"))
        _check_known(path, content, {"input_ids", "loss_mask", "aux_hidden_state", "hidden_state"})
        token_ids, loss_mask = content["input_ids"].flatten(), content["loss_mask"].flatten()
        aux, last = (
            _rows_of_batch(content[name], name, path) for name in ("aux_hidden_state", "hidden_state")
        )
        _check_lengths(path, len(token_ids), loss_mask=loss_mask, aux_hidden_state=aux, hidden_state=last)
        # SpecForge pads the samples of a batch with zeros to the longest one, and writes the padding too.
        used = (token_ids != 0) | (loss_mask != 0)
        length = int(used.nonzero()[-1]) + 1 if used.any() else 0
        rows = slice(0, length)
        return _checked(
            Sample(
                str(path), token_ids[rows], loss_mask[rows], (aux[rows],), last[rows], len(token_ids) - length
            )
        )


class SpeculatorsFiles:
    """A data set (input_ids, loss_mask) and per row a safetensors file: hidden_states [L, 4, Ht], token_ids
    [L]. In float8, hidden_states_scales besides, fp32 [L, 1, 1] ([L, 1] at first): a factor per token.
    """

    writer = "speculators generate-offline-data"
    last_is_normed = False

    def __init__(self, folder: Path, hidden_states: Path) -> None:
        try:
            found = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--from {folder}: the data set cannot be read ({error}). Prepare it again"
            ) from error
        missing = {"input_ids", "loss_mask"} - set(found.column_names)
        if missing:
            raise ValueError(
                f"--from {folder}: the data set lacks {', '.join(sorted(missing))}, it is none of speculators"
            )
        if not hidden_states.is_dir():
            raise ValueError(
                f"{hidden_states} is not a folder: name that of the hs_*.safetensors with --hidden-states"
            )
        self.rows = found.with_format("torch")
        self.hidden_states = hidden_states

    def __len__(self) -> int:
        return len(self.rows)

    def aux_layers(self, num_layers: int) -> AuxLayers:
        return (2, num_layers // 2, num_layers - 3)

    def sample(self, index: int) -> Sample | None:
        path = self.hidden_states / f"hs_{index}.safetensors"
        if path.with_name(f"{path.name}.lock").exists():
            raise ValueError(
                f"{path} is locked, so it is still being written: import it when the server has finished"
            )
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                _check_known(path, names, {"hidden_states", "token_ids", SCALES})
                hidden, token_ids = file.get_tensor("hidden_states"), file.get_tensor("token_ids")
                scales = file.get_tensor(SCALES) if SCALES in names else None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and generate it again") from error
        row = self.rows[index]
        if not torch.equal(token_ids.long(), row["input_ids"].long()):
            raise ValueError(
                f"{path} has other tokens than row {index} of the data set: the two do not belong together"
            )
        if hidden.ndim != 3:
            raise ValueError(
                f"{path}: hidden_states has shape {tuple(hidden.shape)}, expected [tokens, layers, hidden "
                "size]"
            )
        hidden = _scaled(path, hidden, scales)
        return _from_layers(path, token_ids, row["loss_mask"], hidden.unbind(1))


class SpeculatorsPickles:
    """One pickled file per sample: input_ids [L], loss_mask [L], hidden_states, a list of [L, Ht], the last
    layer's last.
    """

    writer = "speculators 0.3 / 0.4 data_generation_offline"
    last_is_normed = False

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.config = folder / "data_config.json"

    def __len__(self) -> int:
        return len(self.paths)

    def aux_layers(self, num_layers: int) -> AuxLayers:
        layers = [2, num_layers // 2, num_layers - 3, num_layers - 1]
        if self.config.is_file():
            try:
                layers = list(map(int, json.loads(self.config.read_text())["hidden_states"]["layer_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.config} names no hidden_states.layer_ids ({error!r}): correct or remove it"
                ) from error
        if not 1 <= len(layers) - 1 <= MOST_LAYERS or layers[-1] != num_layers - 1:
            raise ValueError(
                f"{self.config}: the outputs of layers {layers} were captured, but a draft learns from 1 to "
                f"{MOST_LAYERS} layers and the last one, {num_layers - 1}. Generate the files again without "
                "--layer-ids."
            )
        return tuple(layer + 1 for layer in layers[:-1])

    def sample(self, index: int) -> Sample:
        path = self.paths[index]
        content = _load_pickle(path, ("input_ids", "loss_mask"))
        _check_known(path, content, {"input_ids", "loss_mask", "hidden_states"})
        hidden = content.get("hidden_states")
        if not isinstance(hidden, list) or not all(
            isinstance(layer, Tensor) and layer.ndim == 2 for layer in hidden
        ):
            raise ValueError(
                f"{path}: hidden_states is not a list of tensors [tokens, hidden size]: generate the file "
                "again"
            )
        return _from_layers(path, content["input_ids"], content["loss_mask"], hidden)


def _load_pickle(path: Path, tensors: Sequence[str]) -> dict[str, Any]:
    """The dictionary in a file of torch.save.

    Args:
        tensors: names of the tensors that it must have.

    Raises:
        ValueError: the file cannot be read, or lacks one of them.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                content = torch.load(io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as tensors ({reason}): it is damaged, or holds more than data"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {type(content).__name__}, expected a dictionary with {', '.join(tensors)}"
        )
    wrong = [name for name in tensors if not isinstance(content.get(name), Tensor)]
    if wrong:
        raise ValueError(
            f"{path} has no tensor {', '.join(wrong)} (keys present: {', '.join(map(str, content))})"
        )
    return content


def _check_known(path: Path, names: Iterable[str], known: Set[str]) -> None:
    """Raises ValueError for what would be left out unread: it may change what the rest means."""
    unknown = sorted(set(map(str, names)) - known)
    if unknown:
        raise ValueError(
            f"{path} holds {', '.join(unknown)}, which this import does not know (it knows "
            f"{', '.join(sorted(known))}): it may change what the others mean. Write the files by a version "
            "of their writer that docs/hidden-states.md names, or take these out if they change nothing."
        )


def _scaled(path: Path, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Hidden states [L, layers, Ht] as the target gave them: bfloat16 where they lie in float8."""
    is_float8 = hidden.is_floating_point() and hidden.itemsize == 1
    if is_float8 != (scales is not None):
        raise ValueError(
            f"{path}: hidden_states is {hidden.dtype} {'without' if is_float8 else 'beside'} {SCALES}: "
            "float8 rows, and no others, have a scale each. Generate the file again."
        )
    if scales is None:
        return hidden
    if scales.shape not in {(len(hidden), 1, 1), (len(hidden), 1)} or not scales.isfinite().all():
        raise ValueError(
            f"{path}: {SCALES} is {tuple(scales.shape)}, expected {(len(hidden), 1, 1)} finite factors, one "
            "per token. Generate the file again."
        )
    return (hidden.float() * scales.float().reshape(-1, 1, 1)).to(torch.bfloat16)


def _rows_of_batch(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Take the batch dimension off: [1, L, W] or [L, W] -> [L, W]."""
    rows = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    if rows.ndim != 2:
        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected [1, tokens, width]")
    return rows


def _from_layers(path: Path, token_ids: Tensor, loss_mask: Tensor, layers: Sequence[Tensor]) -> Sample:
    if len(layers) != 4:
        raise ValueError(
            f"{path} has {len(layers)} hidden states per token, expected 4: of three layers and the last. "
            "Generate the files again with the layers of EAGLE-3."
        )
    _check_lengths(
        path,
        len(token_ids),
        loss_mask=loss_mask,
        **{f"hidden_states[{i}]": layer for i, layer in enumerate(layers)},
    )
    return _checked(Sample(str(path), token_ids, loss_mask, tuple(layers[:3]), layers[3]))


def _check_lengths(path: Path, length: int, **columns: Tensor) -> None:
    for name, column in columns.items():
        if len(column) != length:
            raise ValueError(
                f"{path}: {name} has {len(column)} rows and input_ids {length}: the file is damaged"
            )


def _checked(sample: Sample) -> Sample:
    """Check a sample's dtypes and widths; returns it with token_ids as int64 and loss_mask as bool.

    Raises:
        ValueError: token_ids are not integers [L], the mask has other values than 0 and 1, or the aux states
            are not 1 to `MOST_LAYERS` hidden states wide.
    """
    if sample.token_ids.ndim != 1 or sample.token_ids.is_floating_point():
        raise ValueError(
            f"{sample.place}: input_ids is {sample.token_ids.dtype} {tuple(sample.token_ids.shape)}, "
            "expected [tokens]"
        )
    values = set(sample.loss_mask.unique().tolist())
    if not values <= {0, 1}:
        raise ValueError(f"{sample.place}: loss_mask holds {sorted(values - {0, 1})[0]}, expected 0 and 1")
    width, last = sum(part.shape[1] for part in sample.aux_parts), sample.last.shape[1]
    if width % last or not 1 <= width // last <= MOST_LAYERS:
        raise ValueError(
            f"{sample.place}: the aux states are {width} wide, expected 1 to {MOST_LAYERS} times the last "
            f"state's {last}"
        )
    return Sample(
        sample.place,
        sample.token_ids.long(),
        sample.loss_mask.bool(),
        sample.aux_parts,
        sample.last,
        sample.padding,
    )
