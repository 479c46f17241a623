"""Checking that all ranks run the same program on the same data, once, before any weight is made."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

import eagle3_ds
from eagle3_ds.config import Recipe, dump_recipe, load_deepspeed_config
from eagle3_ds.launch.hosts import PACKAGES
from eagle3_ds.launch.probe import code_digest
from eagle3_ds.topology import Topology

_FIX = {
    "recipe": "Put output_dir on storage that all hosts share.",
    "DeepSpeed JSON": "Put it on storage that all hosts share, or copy it to all of them.",
    "data": "Put data.cache_dir and output_dir on storage that all hosts share.",
    "code of eagle3_ds": "Run the same checkout of eagle3_ds on all hosts.",
}


def require_same_identity(recipe: Recipe, topology: Topology) -> None:
    """Compare code, packages, recipe, DeepSpeed JSON and data of all ranks. Collective.

    Raises:
        ValueError: something differs. It is raised on all ranks, and names what differs on which ranks and
            hosts.
    """
    texts = _gather([f"{key}\n{value}" for key, value in own_identity(recipe).items()], topology.device)
    different = differences([dict(line.split("\n", 1) for line in lines) for lines in texts])
    if different:
        raise ValueError(
            "\n  ".join(["The ranks are not alike, so they would not train one model:", *different])
        )


def own_identity(recipe: Recipe) -> dict[str, str]:
    """The facts that must be the same on every rank, and this rank's `host`, which may differ."""
    output_dir = Path(recipe.output_dir)
    return {
        "host": socket.gethostname(),
        "code of eagle3_ds": code_digest(Path(eagle3_ds.__file__).parent),
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "recipe": _digest(dump_recipe(recipe).encode()),
        "DeepSpeed JSON": _digest(json.dumps(load_deepspeed_config(recipe.deepspeed)).encode()),
        "data": _digest(
            (output_dir / "prepared.json").read_bytes() + (output_dir / "vocabulary.safetensors").read_bytes()
        ),
    }


def differences(identities: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each fact that differs between ranks, with every value and the ranks and hosts that have
    it.
    """
    lines = []
    for key in identities[0]:
        holders: dict[str, list[int]] = {}
        for rank, identity in enumerate(identities):
            holders.setdefault(identity[key], []).append(rank)
        if key != "host" and len(holders) > 1:
            told = [
                (
                    f"{value} on ranks {ranks} "
                    f"({', '.join(sorted({identities[rank]['host'] for rank in ranks}))})"
                )
                for value, ranks in holders.items()
            ]
            lines.append(
                f"{key}: {'; '.join(told)}. {_FIX.get(key, f'Install the same {key} on all hosts.')}"
            )
    return lines


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _gather(lines: Sequence[str], device: torch.device) -> list[list[str]]:
    """The lines of every rank, by rank. Collective. They are sent as bytes in a tensor, because
    `all_gather_object` unpickles what it receives.
    """
    if not dist.is_initialized():
        return [list(lines)]
    own = "\0".join(lines).encode()
    longest = torch.tensor([len(own)], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    rows = torch.zeros(dist.get_world_size(), int(longest), dtype=torch.int32, device=device)
    rows[dist.get_rank(), : len(own)] = torch.tensor(list(own), dtype=torch.int32)
    dist.all_reduce(rows)
    return [bytes(row).rstrip(b"\0").decode().split("\0") for row in rows.tolist()]
