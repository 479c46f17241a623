"""What must never be in the sources: code that data could run, a shell, ssh without its checks, secrets on
their way out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eagle3_ds.config import load_recipe
from eagle3_ds.launch.command import LaunchOptions, plan_launch
from eagle3_ds.targets import load_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "eagle3_ds").rglob("*.py"))


def calls(source: str) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Dotted name and keyword arguments of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg or "**": keyword.value for keyword in node.keywords}


def is_constant(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def runs_pickled_code(name: str, keywords: dict[str, ast.expr]) -> bool:
    if name == "torch.load":
        return not is_constant(keywords.get("weights_only"), True)
    if name.endswith(("np.load", "numpy.load")):
        return "allow_pickle" in keywords
    return name in ("pickle.load", "pickle.loads", "pickle.Unpickler") or name.endswith("all_gather_object")


def starts_a_shell(name: str, keywords: dict[str, ast.expr]) -> bool:
    return name in ("os.system", "os.popen") or "shell" in keywords


def evaluates_text(name: str, keywords: dict[str, ast.expr]) -> bool:
    return name in ("eval", "exec", "compile", "__import__")


def trusts_a_model_folder(name: str, keywords: dict[str, ast.expr]) -> bool:
    if not (name.endswith((".from_pretrained", ".from_config")) and "Auto" in name):
        return False
    if name == "AutoHfQuantizer.from_config":  # chooses among classes of transformers, and reads no folder
        return False
    return "**" not in keywords and not is_constant(keywords.get("trust_remote_code"), False)


FORBIDDEN = (runs_pickled_code, starts_a_shell, evaluates_text, trusts_a_model_folder)


@pytest.mark.parametrize("is_forbidden", FORBIDDEN, ids=lambda rule: rule.__name__)
def test_the_package_has_no_such_call(is_forbidden: Callable[[str, dict[str, ast.expr]], bool]) -> None:
    found = {
        path.name: name
        for path in SOURCES
        for name, keywords in calls(path.read_text())
        if is_forbidden(name, keywords)
    }
    assert not found


@pytest.mark.parametrize(
    ("is_forbidden", "source"),
    [
        (runs_pickled_code, "torch.load(path)"),
        (runs_pickled_code, "torch.load(path, weights_only=False)"),
        (runs_pickled_code, "pickle.loads(data)"),
        (runs_pickled_code, "dist.all_gather_object(found, own)"),
        (starts_a_shell, "subprocess.run(line, shell=True)"),
        (evaluates_text, "eval(text)"),
        (trusts_a_model_folder, "AutoTokenizer.from_pretrained(path)"),
        (trusts_a_model_folder, "transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)"),
    ],
)
def test_the_rules_can_be_broken(
    is_forbidden: Callable[[str, dict[str, ast.expr]], bool], source: str
) -> None:
    ((name, keywords),) = calls(source)
    assert is_forbidden(name, keywords)


def test_nobody_turns_off_the_checks_of_ssh() -> None:
    for path in (*SOURCES, ROOT / "launch.sh", *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*")):
        if path.name != Path(__file__).name and path.is_file():
            text = path.read_text()
            assert "StrictHostKeyChecking no" not in text and "StrictHostKeyChecking=no" not in text, path


def test_a_tokenizer_that_brings_code_is_refused_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"target.path={tmp_path}", "target.build=null"])
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(recipe.target)
    assert not (tmp_path / "was-run").exists()


def test_no_secret_leaves_by_the_launch(tmp_path: Path) -> None:
    """Variables that go to other hosts are named one by one; the rest of the environment stays."""
    secrets = dict.fromkeys(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"),
        "s3cret",
    )
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"output_dir={tmp_path}"])
    options = LaunchOptions(hostfile=str(ROOT / "recipes/2nodes.hostfile"))
    plan = plan_launch(options, {"node-0": (0,), "node-1": (0,)}, "cpu", recipe, None, secrets)
    assert "s3cret" not in repr(plan)
