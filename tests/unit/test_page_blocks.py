"""Every fenced block of the pages is held by what will read it: commands, recipes, JSON, Python, hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from eagle3_ds.launch.command import read_hostfile
from tests.unit.page_code import READERS_OWN, faults_of_json, faults_of_python, faults_of_recipe
from tests.unit.page_commands import OTHER_MODULES, OTHER_PROGRAMS, calls, faults_of_script
from tests.unit.test_pages import WRITTEN_NOW

FENCE = re.compile(r"\s*(```+|~~~+)(.*)")


class Block(NamedTuple):
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, without the fences.

    Raises:
        ValueError: the last one is not closed.
    """
    found: list[Block] = []
    opened: tuple[str, str] | None = None
    lines: list[str] = []
    for line in page.splitlines(keepends=True):
        fence = FENCE.fullmatch(line.rstrip("\n"))
        if fence is not None and opened is None:
            opened, lines = (fence[1], fence[2].strip()), []
        elif fence is not None and opened is not None and fence[1] == opened[0] and not fence[2]:
            found.append(Block(opened[1], "".join(lines)))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"a block of {opened[1] or 'no language'} is not closed: {lines[:1]}")
    return found


def faults_of_hosts(text: str, folder: Path) -> list[str]:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    try:
        read_hostfile(path)
    except ValueError as error:
        return [str(error)]
    return []


def faults_of_page(page: str, folder: Path) -> list[str]:
    """What is wrong in the blocks of a page. Its Python is one program, told in parts."""
    blocks = blocks_of(page)
    faults: list[str] = []
    for language, text in blocks:
        if language in ("", "sh", "bash"):
            faults += faults_of_script(text)
        elif language == "yaml":
            faults += faults_of_recipe(text)
        elif language == "json":
            faults += faults_of_json(text)
        elif language == "hostfile":
            faults += faults_of_hosts(text, folder)
        elif language not in ("python", "signatures"):  # test_kernels_emulated.py reads signatures.
            faults.append(f"nothing here reads a block of {language}")
    return faults + faults_of_python("".join(text for language, text in blocks if language == "python"))


@pytest.mark.parametrize("page", WRITTEN_NOW, ids=lambda page: page.name)
def test_every_block_is_right(page: Path, tmp_path: Path) -> None:
    assert faults_of_page(page.read_text("utf-8"), tmp_path) == []


def test_nothing_is_listed_that_no_page_has() -> None:
    """So that a list does not grow into one that lets everything through."""
    pages = [page.read_text("utf-8") for page in WRITTEN_NOW]
    blocks = [block for page in pages for block in blocks_of(page)]
    programs = {words[0] for lang, text in blocks if lang in ("", "sh", "bash") for words in calls(text)}
    assert programs >= OTHER_PROGRAMS
    assert all(f"python -m {name}" in "".join(pages) for name in OTHER_MODULES)
    python = "".join(text for language, text in blocks if language == "python")
    assert all(re.search(rf"\b{name}\b", python) for name in READERS_OWN)
    assert sum(page.count("\n```") for page in pages) == 2 * len(blocks) > 80


def in_block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


WRONG_COMMANDS = {
    "eagle3-ds planer R": "no command 'planer'",
    "eagle3-ds plan": "recipe",
    "eagle3-ds plan R --gpu 8": "--gpu",
    "eagle3-ds plan R --gpus many": "many",
    "eagle3-ds plan R train.stepz=20": "train.stepz: unknown key",
    "eagle3-ds plan R train.steps=few": "train.steps",
    "eagle3-ds data": "a group of commands",
    "eagle3-ds data lose R": "no action 'lose'",
    "eagle3-ds launch quickstrt": "no recipe of that name",
    "./launch.sh recipes/none.yaml": "recipes/none.yaml is not a file",
    "./launch.sh R --resume never": "never",
    "./launch.sh R --hostfile hosts --numgpus 8": "--numgpus",
    'name="recipes/none.yaml"; ./launch.sh "$name" &': "recipes/none.yaml is not a file",
    "ls | eagle3-ds reports R > file": "no command 'reports'",
    "eagle3-ds export R [--pushed owner/name]": "--pushed",
    "./launch.sh test -z 3": "unrecognized arguments: -z",
    "./launch.sh test tests/none": "tests/none",
    "pytest tests/unit/test_none.py::test_a": "test_none.py",
    "python -m benchmarks.none": "no module benchmarks.none",
    "python -m judge.exactness --sort": "--sort",
    "python -m benchmarks.resume --kills many": "invalid int value: 'many'",
    "python -m judge.vllm_families": "required: folder",
    "python -m judge.cases --each 3": "no program with arguments",
    "python examples/none.py": "no file examples/none.py",
    ".ci/walk": "no program of this repository",
    "curl http://host": "not among OTHER_PROGRAMS",
    "vllm serve T --speculative-config '{\"method\": eagle3}'": "no JSON",
    "ls 'DIR": "unexpected EOF",
}


@pytest.mark.parametrize("line", WRONG_COMMANDS)
def test_a_wrong_command_fails(line: str, tmp_path: Path) -> None:
    faults = faults_of_page(in_block("sh", line), tmp_path)
    assert faults and WRONG_COMMANDS[line] in faults[0]


def test_a_right_command_does_not(tmp_path: Path) -> None:
    lines = [
        "# a comment, isn't it",
        "eagle3-ds plan R --gpus 8 train.steps=20  # 20, not 300",
        "eagle3-ds store import RECIPE --from FOLDER [--hidden-states FOLDER] [section.key=value ...]",
        "eagle3-ds cache prune A.yaml B.yaml --older-than 30",
        "./launch.sh quickstart --no-install 'data.train=[answers.jsonl]'",
        "./launch.sh test -n 0 -k packing tests/unit/test_pages.py::test_links_lead_somewhere",
        "OMP_NUM_THREADS=1 python -m judge.exactness --short",
        "vllm serve T --speculative-config \\",
        '  \'{"method": "eagle3", "model": D}\'',
    ]
    assert faults_of_page(in_block("", *lines), tmp_path) == []


WRONG_BLOCKS = {
    "an unknown section": ("yaml", "trian: {steps: 3}", "trian: unknown key"),
    "an unknown key": ("yaml", "target:\n  capture: server\n  sever: {}", "target.sever: unknown key"),
    "a value of another kind": ("yaml", "train:\n  steps: many", "train.steps"),
    "a whole recipe": (
        "yaml",
        "target: {path: Qwen/Qwen3-8B}\ntrain: {epoch: 2}",
        "train.epoch: unknown key",
    ),
    "no mapping": ("yaml", "target", "no mapping"),
    "no YAML": ("yaml", "target: [", "expected"),
    "no JSON": ("json", '{"a": 1}\n{"a": 2,}', "no JSON"),
    "no host": ("hostfile", "node-0 slot=8", "not of the form"),
    "an unknown language": ("toml", "a = 1", "toml"),
    "no Python": ("python", "for x in", "invalid syntax"),
    "an import": ("python", "from eagle3_ds import Rolout", "Rolout"),
    "a module": ("python", "import eagle3_ds.exports", "eagle3_ds.exports"),
    "a name": ("python", "print(trianer)", "the name trianer"),
    "a keyword": (
        "python",
        'from eagle3_ds import RolloutTrainer\nRolloutTrainer("r.yaml", vocabulry=1)',
        "unexpected keyword argument 'vocabulry'",
    ),
    "a missing argument": ("python", "from eagle3_ds import Rollout\nRollout(aux)", "missing a required"),
    "an attribute": (
        "python",
        'from eagle3_ds import RolloutTrainer\nt = RolloutTrainer("r.yaml")\nt.vocabulry',
        "RolloutTrainer has no vocabulry",
    ),
    "a method's argument": (
        "python",
        'from eagle3_ds import RolloutTrainer\nt = RolloutTrainer("r.yaml")\nt.save("a", "b")',
        "too many positional arguments",
    ),
    "of what a method returns": (
        "python",
        'from eagle3_ds import RolloutTrainer\nt = RolloutTrainer("r.yaml")\n'
        'client = t.connect("http://host", "/rows")\nclient.kick()',
        "ServerClient has no kick",
    ),
}


@pytest.mark.parametrize("what", WRONG_BLOCKS)
def test_a_wrong_block_fails(what: str, tmp_path: Path) -> None:
    language, text, words = WRONG_BLOCKS[what]
    faults = faults_of_page(in_block(language, text), tmp_path)
    assert len(faults) == 1 and words in faults[0]


def test_a_fence_that_is_not_closed_fails() -> None:
    with pytest.raises(ValueError, match="a block of yaml is not closed"):
        blocks_of("```yaml\na: 1\n~~~\n")
