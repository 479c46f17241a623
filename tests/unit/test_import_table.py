"""The house's import table (which room may import which), read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "eagle3_ds"
TABLE: dict[str, set[str]] = {
    "config": set(),
    "device": set(),
    "layout": {"device"},
    "collectives": set(),
    "kernels": set(),
    "launch": {"config", "device"},
    "topology": {"config", "device", "layout", "launch"},
    "costs": {"config", "layout"},
    "attention": {"device", "layout", "collectives", "kernels", "costs"},
    "draft": {"config", "device", "layout", "attention", "costs"},
    "algorithms": {"config", "layout", "attention", "draft", "costs"},
    "losses": {"config", "device", "draft"},
    "plan": {"layout", "costs"},
    "targets": {"config", "layout", "attention"},
    "store": {"device", "layout"},
    "data": {"config", "layout"},
    "serving": {"config", "store", "targets"},
    "checkpoint": {"config", "device", "topology", "collectives", "draft"},
    "guard": {"config", "topology", "layout", "collectives", "launch"},
    "export": {"config", "attention", "draft", "algorithms"},
    "eval": {"config", "data", "draft", "algorithms", "targets"},
    "train": {
        "config", "device", "topology", "layout", "collectives", "kernels", "costs", "attention", "draft",
        "algorithms", "losses", "targets", "store", "data", "serving", "checkpoint", "guard", "export",
        "eval", "launch",
    },
    "watch": {"config", "launch"},
    "run": {
        "config", "device", "topology", "layout", "kernels", "costs", "attention", "draft", "algorithms",
        "targets", "store", "data", "serving", "plan", "checkpoint", "launch", "eval", "export", "train",
    },
    "cli": {
        "config", "device", "topology", "layout", "kernels", "costs", "attention", "draft", "algorithms",
        "targets", "store", "data", "plan", "checkpoint", "launch", "run", "watch",
    },
}  # fmt: skip

# Packages of others that one room alone imports: what a user sees is the command line's to choose.
ROOM_OF = {
    "deepspeed": "train", "click": "cli", "rich": "cli", "vllm": "serving",
    "tensorboard": "train", "wandb": "train", "mlflow": "train", "trackio": "train",
}  # fmt: skip


def imported_modules(source: str) -> set[str]:
    """Absolute module names that a source imports anywhere, function bodies and type-checking blocks
    included.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def trespasses(room: str, source: str) -> set[str]:
    """What a file of `room` imports without the right to."""
    modules = imported_modules(source)
    rooms = {
        parts[1]
        for parts in (name.split(".") for name in modules)
        if parts[0] == "eagle3_ds" and len(parts) > 1
    }
    found = {name for name in rooms if name in TABLE} - TABLE[room] - {room}
    return found | {name for name in modules if ROOM_OF.get(name.split(".")[0], room) != room}


@pytest.mark.parametrize("room", sorted(TABLE))
def test_room_imports_only_what_the_table_allows(room: str) -> None:
    for path in sorted((PACKAGE / room).glob("**/*.py")):
        assert not trespasses(room, path.read_text(encoding="utf-8")), path


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("**/*.py"))}
    assert rooms <= set(TABLE)


def test_no_command_needs_what_stays_in_the_repository() -> None:
    apart = {"judge", "benchmarks", "tests", "examples"}
    for path in sorted(PACKAGE.glob("**/*.py")):
        modules = imported_modules(path.read_text(encoding="utf-8"))
        assert not apart & {name.split(".")[0] for name in modules}, path


def test_no_file_outside_the_rooms_imports_what_one_room_alone_may() -> None:
    for path in sorted(PACKAGE.glob("*.py")):
        modules = imported_modules(path.read_text(encoding="utf-8"))
        assert not {name for name in modules if name.split(".")[0] in ROOM_OF}, path


def test_what_every_room_may_use_uses_no_room() -> None:
    for shared in ("say.py", "patient_http.py", "parts.py", "colors.py"):
        modules = imported_modules((PACKAGE / shared).read_text(encoding="utf-8"))
        assert not {name for name in modules if name.split(".")[0] == "eagle3_ds"}, shared


def test_progress_is_shown_in_one_way_and_nothing_is_printed() -> None:
    for path in sorted(PACKAGE.glob("**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if path.name != "say.py":
            assert "tqdm" not in {name.split(".")[0] for name in imported_modules(ast.unparse(tree))}, path
        # A supervisor imports the standard library alone, and its last words go to stderr. What hosts are
        # sent answers by a line.
        if path.parent.name != "cli" and path.name not in ("supervisor.py", "probe.py", "meeting.py"):
            assert "print" not in names, path


def test_the_check_can_fail() -> None:
    assert trespasses("layout", "from eagle3_ds.config import Recipe") == {"config"}
    assert trespasses("draft", "def f():\n    import deepspeed") == {"deepspeed"}
    assert trespasses("layout", "from eagle3_ds import train") == {"train"}
    assert trespasses("run", "import rich.table\nfrom eagle3_ds.cli.main import main") == {
        "rich.table",
        "cli",
    }
    assert not trespasses("draft", "from eagle3_ds.attention.merge import merge\nimport torch")
