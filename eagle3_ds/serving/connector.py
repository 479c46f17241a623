"""A KV connector for vLLM that writes hidden states to files: it runs inside the server, on any device.

vLLM's method `extract_hidden_states` keeps the inputs of chosen layers in a paged cache of their own, however
a prompt is cut into chunks. When a request that asks for it has ended, its pages are read before they are
freed, and written row by row as one safetensors file that appears whole or not at all.

The server's environment has none of our packages, so this file imports vLLM, torch and the standard library
alone, and is given to the server as the module `eagle3_ds_connector`. docs/hidden-states.md describes the
file.

Legend: n tokens of a prompt, S hidden states per token, H hidden size of the target.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

logger = logging.getLogger(f"vllm.{__name__}")

ROWS_FORMAT = "eagle3_ds rows 1"
PREFIX = "eagle3_ds_prefix"
"""In a request's kv_transfer_params: how the name of its file begins. A request without it writes nothing."""
ROWS_FILE = "eagle3_ds_rows"
"""In a response's kv_transfer_params: the name of its file, without a folder and without an ending."""
PIECE_BYTES = 2**26
"""Rows are read from the cache and written in pieces of this size at most."""
SAMPLE_BYTES = 2**20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WHOLE = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


@dataclass
class Save:
    """A request whose rows are to be written: its file, its prompt, and the pages that hold its rows."""

    request: str
    name: str
    token_ids: list[int]
    pages: list[int]


@dataclass
class RowsMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers in a step."""

    saves: list[Save] = field(default_factory=list)


class RowsConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes the hidden states of requests into the folder `folder` of kv_connector_extra_config.

    Every rank of a tensor parallel server has whole rows; the first one writes them.

    Raises:
        ValueError: the server was started without the method `extract_hidden_states`, without a folder, or
            with prefix caching.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "extract_hidden_states":
            raise ValueError("RowsConnector: start vLLM with the speculative method extract_hidden_states")
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("RowsConnector: start vLLM with --no-enable-prefix-caching")
        folder = self._kv_transfer_config.get_from_extra_config("folder", None)
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"RowsConnector: kv_connector_extra_config has folder {folder!r}: no such folder"
            )
        self.folder = Path(folder)
        layers = speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids
        self.layer_ids = sorted(set(map(int, layers)))
        self._group = _group_of_rows(kv_cache_config)
        # Of the scheduler's side:
        self._saves: list[Save] = []
        self._spoiled: set[str] = set()
        # Of the worker's side:
        self._cache: torch.Tensor | None = None
        self._about: dict[str, str] = {}
        self._writers = ThreadPoolExecutor(4, thread_name_prefix="rows")
        self._writing: dict[str, Future[None]] = {}

    # The scheduler's side.

    def get_finished_count(self) -> int:
        """How many workers report a request as written: the one that writes."""
        return 1

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert num_external_tokens == 0, "this connector writes and loads nothing"

    def build_connector_meta(self, scheduler_output: Any) -> RowsMetadata:
        """Hand the finished requests to the workers, and note the steps whose rows vLLM leaves out.

        vLLM skips caching hidden states in a step in which any sequence reaches the server's longest length.
        """
        cached = scheduler_output.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        scheduled = scheduler_output.num_scheduled_tokens
        longest = max((before.get(name, 0) + number for name, number in scheduled.items()), default=0)
        if longest + 1 > self._vllm_config.model_config.max_model_len:
            self._spoiled |= set(scheduled)
        metadata = RowsMetadata(self._saves)
        self._saves = []
        return metadata

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep the pages of a request that asks for its rows until they are written."""
        spoiled = request.request_id in self._spoiled
        self._spoiled.discard(request.request_id)
        asked = (request.kv_transfer_params or {}).get(PREFIX)
        if not asked or request.status.name not in WHOLE or not request.prompt_token_ids:
            return False, None
        name = re.sub(r"[^A-Za-z0-9-]", "_", f"{asked}.{request.request_id}".replace(".", "-"))
        if spoiled:
            _write_failure(
                self.folder / name,
                "another request reached the server's --max-model-len in the same step, and vLLM keeps no "
                "hidden states of such a step",
            )
            return False, {ROWS_FILE: name}
        self._saves.append(Save(request.request_id, name, list(request.prompt_token_ids), list(block_ids)))
        return True, {ROWS_FILE: name}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[self._group]) if block_ids else (False, None)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "LBNHC"  # all hidden states of a token lie together

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the cache [pages, S, page size, H] of hidden states, on the rank that writes."""
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        if get_tensor_model_parallel_rank() != 0:
            return
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        if not layers:
            return  # of pipeline parallel ranks the last one alone has it
        (name,) = layers
        self._cache = kv_caches[name]
        if self._cache.shape[1] != len(self.layer_ids):
            raise ValueError(f"RowsConnector: a cache of {tuple(self._cache.shape)} for {self.layer_ids}")
        model = self._vllm_config.model_config
        self._about = {
            "format": ROWS_FORMAT,
            "layer_ids": ",".join(map(str, self.layer_ids)),
            "num_layers": str(model.get_total_num_hidden_layers()),
            "vocab_size": str(model.get_vocab_size()),
            "max_length": str(model.max_model_len),
            "target_weights": _digest(str(model.model), model.revision),
            "vllm": vllm_version,
        }

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Rows are read when their request has ended."""

    def wait_for_save(self) -> None:
        """Rows are read when their request has ended."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Start writing the requests that have ended; returns those that are written or failed."""
        if self._cache is not None and self.has_connector_metadata():
            for save in self._get_connector_metadata().saves:
                after = _mark(self._cache.device)
                self._writing[save.request] = self._writers.submit(self._write, save, after)
        done = {request for request, future in self._writing.items() if future.done()}
        for request in done:
            del self._writing[request]
        return done or None, None

    def shutdown(self) -> None:
        """Let the writers end."""
        self._writers.shutdown(wait=True)

    def _write(self, save: Save, after: Callable[[], None]) -> None:
        """Write the rows of a request, or in their place why there are none."""
        try:
            assert self._cache is not None
            after()
            about = {**self._about, "dtype": str(self._cache.dtype).removeprefix("torch.")}
            pieces = _pieces(self._cache, save.pages, len(save.token_ids))
            shape = (len(save.token_ids), self._cache.shape[1], self._cache.shape[3])
            write_rows(self.folder / save.name, save.token_ids, pieces, shape, self._cache.dtype, about)
        except Exception as error:  # a thread's error would be lost, and the client would wait for ever
            logger.exception("the rows of %s could not be written", save.request)
            _write_failure(self.folder / save.name, f"{type(error).__name__}: {error}")


def write_rows(
    path: Path,
    token_ids: list[int],
    pieces: Iterator[torch.Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    about: dict[str, str],
) -> None:
    """Write `path`.safetensors: token_ids int64 [n], hidden_states [n, S, H], row_crc32 int32 [n].

    Args:
        pieces: [m, S, H] on the CPU, in order; together n rows.
        about: strings for the header's __metadata__.
    """
    rows, width = shape[0], shape[1] * shape[2] * dtype.itemsize
    ends = (8 * rows, 8 * rows + rows * width, 12 * rows + rows * width)
    header = json.dumps(
        {
            "__metadata__": about,
            "token_ids": {"dtype": "I64", "shape": [rows], "data_offsets": [0, ends[0]]},
            "hidden_states": {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [ends[0], ends[1]]},
            "row_crc32": {"dtype": "I32", "shape": [rows], "data_offsets": [ends[1], ends[2]]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + array("q", token_ids).tobytes())
            sums = array("I")
            for piece in pieces:
                sums.extend(_write_piece(file, piece))
            if len(sums) != rows:
                raise ValueError(f"{len(sums)} rows instead of {rows}")
            file.write(sums.tobytes())
        os.rename(aside, path.with_name(f"{path.name}.safetensors"))
    finally:
        aside.unlink(missing_ok=True)


def _write_piece(file: BinaryIO, piece: torch.Tensor) -> list[int]:
    """Write rows [m, S, H]; returns the crc32 of each."""
    data = piece.contiguous().flatten(1).view(torch.uint8).numpy()
    file.write(data.data)
    return [zlib.crc32(row.data) for row in data]


def _write_failure(path: Path, reason: str) -> None:
    path.with_name(f"{path.name}.failed").write_text(reason)


def _pieces(cache: torch.Tensor, pages: list[int], rows: int) -> Iterator[torch.Tensor]:
    """The rows [m, S, H] in order, on the CPU, from a cache [pages, S, page size, H]."""
    size = cache.shape[2]
    page_bytes = cache[0].numel() * cache.element_size()
    number = max(1, PIECE_BYTES // page_bytes)
    for start in range(0, -(-rows // size), number):
        index = torch.tensor(pages[start : start + number], device=cache.device)
        piece = cache[index].transpose(1, 2).flatten(0, 1)
        yield piece[: rows - start * size].cpu()


def _mark(device: torch.device) -> Callable[[], None]:
    """Mark this moment on the device's stream. The result, called in any thread, waits until it is past."""
    if device.type == "cpu":
        return lambda: None  # a CPU computes in the order of the calls
    event = torch.Event(device)
    event.record()
    return event.synchronize


def _group_of_rows(kv_cache_config: Any) -> int:
    """The number of the cache group that holds the hidden states.

    Raises:
        ValueError: there is not exactly one.
    """
    from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

    groups = [] if kv_cache_config is None else kv_cache_config.kv_cache_groups
    found = [n for n, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(found) == 1:
        return found[0]
    if len(groups) <= 1:
        return 0
    raise ValueError(f"RowsConnector: {len(found)} of {len(groups)} cache groups hold hidden states, not one")


def _digest(model: str, revision: str | None) -> str:
    """The digest that `eagle3_ds.targets.target_fingerprint` gives to the weights; empty when the checkpoint
    is no folder here, or has no safetensors.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            # Not a hub name, or not in this host's cache. An empty digest says that it is not known; the
            # client then compares the tokens that the server chooses (`fill.require_same_head`).
            return ""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    else:
        files = {single}
    if not all(file.is_file() for file in files):
        return ""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _sample(file):
            digest.update(piece)
    return digest.hexdigest()


def _sample(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        yield stream.read(header)
        for start in (8 + header, (8 + header + size) // 2, size - SAMPLE_BYTES):
            stream.seek(max(8 + header, start))
            yield stream.read(SAMPLE_BYTES)
