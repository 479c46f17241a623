"""What is damaged, and what it means to read it rightly."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from abc import ABC, abstractmethod
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle3_ds.checkpoint.format import (
    KINDS,
    MANIFEST,
    Fragment,
    Manifest,
    damage,
    file_entry,
    rank_file,
    read_manifest,
    write_manifest,
)
from eagle3_ds.checkpoint.fragments import FragmentReader, pieces_in
from eagle3_ds.cli.main import main
from eagle3_ds.config import dump_recipe, load_recipe
from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.chat import load_chat_template
from eagle3_ds.data.encode import RowEncoder
from eagle3_ds.data.sources import open_source
from eagle3_ds.launch.command import LaunchOptions, read_hostfile, resolve_hosts
from eagle3_ds.store.index import INDEX_FILE, RowFormat
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.writer import HiddenStateWriter
from judge.fuzz.mutations import damage_bytes, damage_values

RECIPES = Path(__file__).parents[2] / "recipes"
MAX_LENGTH = 64


class Subject(ABC):
    """A file that the product reads.

    Attributes:
        path: where the damaged contents are put.
        samples: contents that are well.
    """

    name: str
    path: Path
    samples: list[bytes]

    @property
    def named(self) -> str:
        """What a clear refusal names."""
        return str(self.path)

    def damaged(self, chance: Random) -> bytes:
        """By bytes or by values, half of the time each."""
        content = chance.choice(self.samples)
        return (
            damage_bytes(content, chance)
            if chance.random() < 0.5
            else self.with_other_values(content, chance)
        )

    @abstractmethod
    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        """The same file with some of its values replaced."""

    @abstractmethod
    def read(self) -> None:
        """Read the file at `path` as the product does, and test what was read.

        Raises:
            ValueError: the product refuses it.
            AssertionError: it was read, but wrongly.
        """


class Recipes(Subject):
    name = "recipe"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.yaml"
        self.samples = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]

    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        return yaml.safe_dump(damage_values(yaml.safe_load(content), chance), allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )

    def read(self) -> None:
        recipe = load_recipe(self.path)
        self.path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(self.path) == recipe
        # What its values mean to machine and target is judged by the launch, which starts nothing here.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert main(["launch", str(self.path), "--dry-run"]) in (0, 2)


class Hostfiles(Subject):
    name = "hostfile"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hostfile"
        self.samples = [
            b"node-0 slots=8\nnode-1 slots=8\n",
            b"# mine\n10.0.0.1 slots=2 # first\n\nfe80::1 slots=16\n",
        ]

    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        numbers = ("0", "1", "-1", "99999999999999", "1.5", "0x8", "", "8 8", "\u0668")
        return re.sub(rb"=\d+", lambda _: f"={chance.choice(numbers)}".encode(), content)

    def read(self) -> None:
        hosts = resolve_hosts(LaunchOptions(hostfile=str(self.path)), "cpu", 0, 1)
        assert hosts == read_hostfile(self.path)
        for host, slots in hosts.items():
            # What goes on ssh's and pdsh's command lines.
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", host), host
            assert slots == tuple(range(len(slots))) and 1 <= len(slots) <= 1024, slots


class DataRows(Subject):
    name = "data rows"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
        rows: list[list[Any]] = [
            [{"messages": chat}, {"messages": [{"role": "system", "content": "be brief"}, *chat, *chat]}],
            [
                {
                    "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                    "system": "c",
                }
            ],
            [{"prompt": "a", "response": "b"}, {"prompt": chat[:1], "response": "é"}],
            [{"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}],
        ]
        self.samples = ["".join(json.dumps(row) + "\n" for row in sample).encode() for sample in rows]
        self.section = DataSection(train=(str(self.path),), max_length=MAX_LENGTH, on_too_long="truncate")
        self.tokenizer = _byte_tokenizer()

    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        rows = [json.loads(line) for line in content.splitlines()]
        return "".join(json.dumps(row) + "\n" for row in damage_values(rows, chance)).encode()

    def read(self) -> None:
        _, rows = open_source(str(self.path), None)
        template = load_chat_template(self.tokenizer)
        batch = RowEncoder(self.tokenizer, template, self.section, len(self.tokenizer)).encode(list(rows))
        assert batch.lengths.sum() == len(batch.input_ids) == len(batch.loss_mask)
        ends = batch.lengths.cumsum()
        for end, length in zip(ends, batch.lengths, strict=True):
            assert 1 <= length <= MAX_LENGTH and batch.loss_mask[end - length : end].any()
        assert ((batch.input_ids >= 0) & (batch.input_ids < len(self.tokenizer))).all()


class StoreIndexes(Subject):
    name = "store index"

    def __init__(self, folder: Path) -> None:
        lengths = {0: 5, 1: 3, 7: 4}
        writer = HiddenStateWriter(
            folder / "store", lengths, RowFormat(3, 1, "float32"), {"target": "a", "documents": "b"}
        )
        generator = torch.Generator().manual_seed(0)
        self.rows = {
            document: torch.rand(length, 3, generator=generator) for document, length in lengths.items()
        }
        for document, aux in self.rows.items():
            writer.append(document, aux, aux[:, :1], torch.arange(len(aux)))
        self.path = writer.finish().path / INDEX_FILE
        self.samples = [self.path.read_bytes()]

    @property
    def named(self) -> str:
        return str(self.path.parent)

    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        return json.dumps(damage_values(json.loads(content), chance)).encode()

    def read(self) -> None:
        store = HiddenStateStore.open(self.path.parent, None)
        for document, length in store.lengths.items():
            rows = store.rows(document, "aux", 0, length)
            assert torch.equal(rows, self.rows[document][:length])


class Manifests(Subject):
    """A checkpoint of one parameter in one rank's file. Half of the damaged values are sealed again, as a
    forger would.
    """

    name = "checkpoint manifest"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "step-000002"
        self.folder.mkdir()
        self.path = self.folder / MANIFEST
        self.values = torch.arange(6.0)
        save_file({f"{kind}/w/0": self.values.clone() for kind in KINDS}, str(self.folder / rank_file(0)))
        recipe = load_recipe(RECIPES / "quickstart.yaml").model_dump(mode="json")
        manifest = Manifest(
            step=2, packs=4, adam_steps=2, skipped_steps=0, heldout_loss=1.5, recipe=recipe,
            mesh={"draft_dp": 1}, parameters={"w": (2, 3)}, versions={"torch": "2"},
            files={rank_file(0): file_entry(self.folder / rank_file(0))},
        )  # fmt: skip
        write_manifest(self.folder, manifest)
        self.samples = [self.path.read_bytes()]

    @property
    def named(self) -> str:
        return str(self.folder)

    def with_other_values(self, content: bytes, chance: Random) -> bytes:
        sealed = json.loads(content)
        if chance.random() < 0.5:
            return json.dumps(damage_values(sealed, chance)).encode()
        manifest = damage_values(sealed["manifest"], chance)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        return json.dumps({"sha256": digest, "manifest": manifest}).encode()

    def read(self) -> None:
        manifest = read_manifest(self.folder)
        problem = damage(self.folder, manifest)
        if problem is not None:
            raise ValueError(problem)
        with FragmentReader(self.folder, manifest, pieces_in(self.folder, manifest.files)) as reader:
            for name, shape in manifest.parameters.items():
                numel = math.prod(shape)
                assert (name, numel) == ("w", 6), manifest.parameters
                whole = Fragment(name, 0, 0, numel)
                assert all(torch.equal(reader.read(kind, whole), self.values) for kind in KINDS)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and a template with an assistant mask."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] "
        "}}\n{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def make_subjects(folder: Path) -> list[Subject]:
    """One of each kind, its files in `folder`."""
    return [Recipes(folder), Hostfiles(folder), DataRows(folder), StoreIndexes(folder), Manifests(folder)]
