"""The wheel, installed apart from the repository and used in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKED = ("eagle3_ds", "recipes", "ds_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
APART = ("judge", "benchmarks", "tests", "examples")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKED:
        # A copy, because a build leaves files beside its sources.
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    common = ["--no-deps", "--no-index"]
    made = ["wheel", *common, "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run([*pip, *made], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", *common, "--target", str(target), str(wheel)], check=True)
    shutil.rmtree(folder / "source")
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python command in `folder`. Dependencies are those of this environment, but -S leaves out its .pth
    files, by which an editable install would bring the repository back.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    environment |= {"PYTHONPATH": os.pathsep.join([str(installed), *packages]), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-S", *words],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def eagle3_ds(installed: Path, folder: Path, *words: str) -> str:
    """What the console script says."""
    done = run(installed, folder, str(installed / "bin" / "eagle3-ds"), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_repository_is_off_the_path(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, eagle3_ds; print(eagle3_ds.__file__); "
        f"print([name for name in {APART} if u.find_spec(name) and "
        f"str(u.find_spec(name).origin).startswith({str(ROOT)!r})])"
    )
    file, apart = run(installed, tmp_path, "-c", code).stdout.splitlines()
    assert Path(file).is_relative_to(installed) and apart == "[]"


def test_the_wheel_holds_every_shipped_file(installed: Path) -> None:
    for kind in ("recipes", "ds_configs"):
        held = {path.name: path.read_bytes() for path in (installed / "eagle3_ds/shipped" / kind).iterdir()}
        assert held == {path.name: path.read_bytes() for path in (ROOT / kind).iterdir()}


def test_versions_and_help_are_told_without_torch(installed: Path, tmp_path: Path) -> None:
    version = eagle3_ds(installed, tmp_path, "--version")
    assert [line.split()[0] for line in version.splitlines()] == [
        "eagle3-ds",
        "torch",
        "deepspeed",
        "transformers",
    ]
    assert "not installed" not in version
    assert "launch" in eagle3_ds(installed, tmp_path, "--help")
    code = (
        "import sys; from eagle3_ds.cli.main import main; status = main(['--version']); "
        "sys.exit(status or bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    assert run(installed, tmp_path, "-c", code).returncode == 0


def test_a_shipped_recipe_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Recipe and DeepSpeed JSON are found inside the package, and the run's folders lie under this one."""
    plan = eagle3_ds(installed, tmp_path, "plan", "quickstart", "--gpus", "4")
    assert f"the shipped {installed / 'eagle3_ds/shipped/recipes/quickstart.yaml'}" in plan
    assert "passed over" not in plan and "deepspeed=zero" in plan
    told = eagle3_ds(installed, tmp_path, "launch", "quickstart", "--dry-run")
    assert "deepspeed: zero3" in told and f"--recipe={tmp_path}/output/quickstart/" in told
    assert "cache_dir: output/cache" in told and "path: output/quickstart-target" in told
    assert not list(tmp_path.iterdir()), "neither plan nor a dry run writes"


def test_a_shipped_recipe_is_a_base_anywhere(installed: Path, tmp_path: Path) -> None:
    told = eagle3_ds(installed, tmp_path, "launch", "quickstart_peagle", "--dry-run")
    assert "algorithm: peagle" in told and "path: output/quickstart-target" in told
    (tmp_path / "mine.yaml").write_text("base: quickstart\ntrain: {steps: 20}\n")
    told = eagle3_ds(installed, tmp_path, "launch", "mine.yaml", "--dry-run")
    assert "steps: 20" in told and "path: output/quickstart-target" in told
    assert f"--recipe={tmp_path}/output/mine/" in told
