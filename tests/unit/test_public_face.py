"""What `import eagle3_ds` offers, and what it does not make anybody wait for."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import eagle3_ds

PACKAGE = Path(eagle3_ds.__file__).parent
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "numpy", "pydantic")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def public(name: str) -> object:
    """What a name stands for; of a room that is a function as well, the function."""
    return eagle3_ds._public(name)


@pytest.mark.parametrize("name", eagle3_ds.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(eagle3_ds, name)
    assert callable(found) and name in dir(eagle3_ds)
    assert (inspect.getdoc(public(name)) or "").strip()


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "export"])
def test_the_stages_tell_all_of_themselves(name: str) -> None:
    function = public(name)
    text = inspect.getdoc(function) or ""
    assert callable(function) and next(iter(inspect.signature(function).parameters)) == "recipe"
    assert "Args:" in text and "Raises:" in text
    assert ("Returns:" in text) == (inspect.signature(function).return_annotation != "None")


def test_types_names_and_homes_agree() -> None:
    """What a type checker reads is what is looked up."""
    (block,) = [
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    homes = {
        alias.name: (node.module or "").removeprefix("eagle3_ds.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == eagle3_ds._HOMES
    assert sorted(homes) == sorted(eagle3_ds.__all__) == eagle3_ds.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'eagle3_ds' has no attribute 'trian'"):
        _ = eagle3_ds.trian


def test_a_room_is_a_function_whatever_was_imported_before(tmp_path: Path) -> None:
    """`train` and `export` are folders of the package, too."""
    refused = f"""
        try:
            NAME({str(tmp_path / "nowhere.yaml")!r})
        except ValueError as error:
            assert "nowhere.yaml" in str(error)
        else:
            raise SystemExit("no ValueError")
    """
    for before in ("from eagle3_ds import NAME", "import eagle3_ds.NAME\nfrom eagle3_ds import NAME"):
        for name, inside in (("train", "rollout.RolloutTrainer"), ("export", "vllm.export_vllm")):
            code = (
                f"{before}\n{inspect.cleandoc(refused)}\nimport eagle3_ds.{name}.{inside.partition('.')[0]}\n"
            )
            code += f"assert callable(eagle3_ds.{name}.{inside}) and callable(eagle3_ds.{name})"
            done = python("-c", code.replace("NAME", name))
            assert done.returncode == 0, done.stderr


def test_import_alone_waits_for_nothing() -> None:
    done = python("-c", f"import sys, eagle3_ds; sys.exit(', '.join({{*{HEAVY}}} & {{*sys.modules}}))")
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "how", [("-m", "eagle3_ds.launch.supervisor"), (str(PACKAGE / "launch/supervisor.py"),)]
)
def test_a_supervisor_stays_light(how: tuple[str, ...]) -> None:
    """It is started beside each rank, as a module or as a file, and outlives what breaks its rank."""
    done = python("-X", "importtime", *how, "--help")
    assert done.returncode == 0 and "--log_folder" in done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "selectors" in imported
    assert not imported & {*HEAVY, "click", "rich", "tqdm", "yaml"}
