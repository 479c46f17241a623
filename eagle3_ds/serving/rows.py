"""Reading the files of hidden states that a server writes, with every check that the file alone allows. Those
of our `connector` have a header that says what they are, and checksums; those of vLLM's own connector have
neither.

Legend: n tokens of a document, S hidden states per token (the aux layers' inputs and the last), H hidden
size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ds.config import TargetSection
from eagle3_ds.store.rows import row_checksums
from eagle3_ds.targets import choose_aux_layers

ROWS_FORMAT = "eagle3_ds rows 1"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The names of dtypes in a safetensors file."""


class DamagedRowsError(ValueError):
    """A file that is cut short or has other bytes than were written: asking again may help."""


@dataclass(frozen=True)
class Expected:
    """What the rows of the recipe's target look like.

    Attributes:
        layer_ids: the aux layers, and the number of layers for the last layer's output.
        weights: the digest of the target's weights, from `targets.target_fingerprint`.
    """

    layer_ids: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    dtype: str
    weights: str

    @classmethod
    def of(cls, section: TargetSection, config: Any, weights: str) -> Expected:
        """Of the recipe's target with this text config."""
        layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
        return cls(
            layer_ids=(*layers, config.num_hidden_layers),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=section.dtype,
            weights=weights,
        )


@dataclass(frozen=True)
class ServedRows:
    """The hidden states of a document: `hidden` [n, S, H], the last of S before the target's final norm."""

    hidden: Tensor
    token: int | None = None
    """The token that the server chose after the document; None when its answer had none."""

    @property
    def aux(self) -> Tensor:
        """[n, (S - 1) * H]."""
        return self.hidden[:, :-1].flatten(1)

    @property
    def last(self) -> Tensor:
        """[n, H]."""
        return self.hidden[:, -1]


class RowFile:
    """One file of hidden states, of either connector, whose rows are read when they are asked for, and then
    checked.

    Raises:
        DamagedRowsError: the file is cut short.
        ValueError: the rows are of another target or of other layers, as far as the file says it; or this
            user may not read it.
    """

    def __init__(self, path: Path, expected: Expected) -> None:
        self.path, self.expected = path, expected
        _require_readable(path)
        try:
            self._file = safe_open(path, framework="pt").__enter__()
            about = self._file.metadata() or {}
            is_stock = "format" not in about and "row_crc32" not in self._file.keys()  # noqa: SIM118
            self._hidden, self._tokens = map(self._file.get_slice, ("hidden_states", "token_ids"))
            self._sums = None if is_stock else self._file.get_slice("row_crc32")
        except (SafetensorError, OSError) as error:
            raise DamagedRowsError(f"{path} cannot be read ({error})") from error
        shape, number = tuple(self._hidden.get_shape()), self._tokens.get_shape()[0]
        if is_stock:
            _check_stock(shape, self._hidden.get_dtype(), expected)
        else:
            check_about(about, expected)
        wanted = (number, len(expected.layer_ids), expected.hidden_size)
        if shape[0] != number and shape[1:] == wanted[1:]:
            raise DamagedRowsError(f"{path} holds {shape[0]} rows for {number} tokens")
        if shape != wanted:
            raise ValueError(
                f"{path} holds rows of shape {shape}, expected {wanted} (tokens, layers, hidden size): the "
                "server runs another model. Serve the model of target.path."
            )

    def require_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises ValueError when the rows are those of another text."""
        _check_tokens(self._tokens[:].tolist(), token_ids)

    def rows(self, start: int, stop: int) -> Tensor:
        """Hidden states [stop - start, S, H]; no other rows are read.

        Raises:
            DamagedRowsError: a row has another checksum than was written; or, in a file without checksums,
                nothing was written.
            ValueError: a row is not finite.
        """
        hidden = self._hidden[start:stop]
        if self._sums is None:
            _check_written(hidden, start, self.path)
        elif len(wrong := (row_checksums(hidden.flatten(1)) != self._sums[start:stop]).nonzero()):
            raise DamagedRowsError(
                f"{self.path}: row {start + int(wrong[0])} has another checksum than was written"
            )
        _check_finite(hidden, start, self.expected)
        return hidden


def read_rows(path: Path, token_ids: Sequence[int], expected: Expected) -> Tensor:
    """The hidden states [n, S, H] in a file, which must be those of these tokens.

    Raises:
        DamagedRowsError: the file is cut short, or a row is damaged.
        ValueError: the rows are of other tokens, of another target, of other layers, or not finite.
    """
    file = RowFile(path, expected)
    file.require_tokens(token_ids)
    return file.rows(0, len(token_ids))


def check_about(about: dict[str, str], expected: Expected) -> None:
    """Compare what the server says of itself in a file's header with the recipe's target.

    Raises:
        ValueError: they differ. The message says how to start the server.
    """
    if about.get("format") != ROWS_FORMAT:
        raise ValueError(
            f"the server's connector writes the format {about.get('format')!r}, this program reads "
            f"{ROWS_FORMAT!r}. Give the server the connector.py of this version."
        )
    layers = ",".join(map(str, expected.layer_ids))
    if about["layer_ids"] != layers:
        raise ValueError(
            f"the server writes the hidden states of layers {about['layer_ids']}, and the recipe needs "
            f"{layers} "
            "(target.aux_layers, then the last layer's output). Start the server with "
            f"eagle_aux_hidden_state_layer_ids [{layers}], or change target.aux_layers."
        )
    if about["vocab_size"] != str(expected.vocab_size):
        raise ValueError(
            f"the server's model has a vocabulary of {about['vocab_size']}, that in target.path of "
            f"{expected.vocab_size}. Serve the model of target.path."
        )
    _check_dtype(about["dtype"], expected)
    if about["target_weights"] not in ("", expected.weights):
        raise ValueError(
            "the server's model has other weights or another config.json than target.path: the draft would "
            "learn from another model. Serve the folder of target.path, or name the served one there."
        )


def _check_stock(shape: tuple[int, ...], dtype: str, expected: Expected) -> None:
    """Of a file without a header: compare what can be seen of it. Its hidden states have `shape`, and `dtype`
    in the words of safetensors.
    """
    _check_dtype(DTYPES.get(dtype, dtype), expected)
    layers = list(expected.layer_ids)
    if len(shape) == 3 and shape[1] != len(layers):
        raise ValueError(
            f"the server writes {shape[1]} hidden states of each token, and the recipe needs {len(layers)}: "
            f"those of layers {layers} (target.aux_layers, then the last layer's output). Start the server "
            f"with eagle_aux_hidden_state_layer_ids {layers}, or change target.aux_layers."
        )


def _check_dtype(found: str, expected: Expected) -> None:
    if found != expected.dtype:
        raise ValueError(
            f"the server computes in {found}, and target.dtype is {expected.dtype}. Start the server "
            f"with --dtype {expected.dtype}, or set target.dtype to {found}."
        )


def _require_readable(path: Path) -> None:
    if path.exists() and not os.access(path, os.R_OK):
        raise ValueError(
            f"{path} may not be read by this user (safetensors gives its files to their owner alone). Run "
            "the server and this program as the same user."
        )


def _check_written(hidden: Tensor, first: int, path: Path) -> None:
    """Raises DamagedRowsError naming the first row that is zero in every layer: vLLM's cache starts with
    zeros, and no token has such hidden states. `first`: the number of row 0.
    """
    empty = (hidden == 0).flatten(1).all(1).nonzero()
    if len(empty):
        raise DamagedRowsError(
            f"{path}: row {first + int(empty[0])} is zero in every layer: vLLM keeps no hidden states of a "
            "step in which a request reaches --max-model-len"
        )


def _check_tokens(found: Sequence[int], sent: Sequence[int]) -> None:
    if len(found) != len(sent):
        raise ValueError(
            f"{len(sent)} tokens were sent and the server gave rows for {len(found)}: it cuts or extends its "
            "prompts. Serve the model without truncation and without a template."
        )
    different = [place for place, (a, b) in enumerate(zip(found, sent, strict=True)) if a != b]
    if different:
        raise ValueError(
            f"token {different[0]} of the document was sent as {sent[different[0]]}, and the server gave "
            "rows "
            f"for {found[different[0]]}: something between changes prompts. Ask vLLM directly, without a "
            "proxy."
        )


def _check_finite(hidden: Tensor, first: int, expected: Expected) -> None:
    """Raises ValueError naming the first row with a NaN or an infinity. `first`: the number of row 0."""
    finite = hidden.isfinite().all(-1)
    if not finite.all():
        row, state = finite.logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"row {first + row} is not finite in the hidden state of layer {expected.layer_ids[state]}: the "
            f"target overflows in {expected.dtype}, or the server is broken. Serve it with another --dtype "
            "(and target.dtype), or another attention backend."
        )
