"""What the gate lets through: every test file is collected, every Python file is linted and typed, and
docs/proofs.md says truly which of its commands run in continuous integration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from mypy.main import process_options

ROOT = Path(__file__).parents[2]
# Names that pytest, ruff, mypy, setuptools, search tools or common ignore lists pass over without a word.
SKIPPED_BY_TOOLS = {
    "dist", "target", "build", "out", "bin", "lib", "venv", "env", "node_modules", "vendor", "site-packages",
    "__pypackages__", "buck-out", "coverage", "htmlcov", "wheels", "eggs", "sdist", "CVS", "SCCS", "tmp",
    "temp",
}  # fmt: skip
DATE = re.compile(r"20\d\d-\d\d-\d\d")


def source_files() -> list[Path]:
    """Every Python file of the checkout that git knows, or would know: what is new counts, what is ignored
    does not.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for name in listed if (path := ROOT / name).is_file())


def hiding_folders(files: Iterable[Path]) -> set[str]:
    """Folders above the files whose name makes a tool skip them."""
    parts = {part for path in files for part in path.relative_to(ROOT).parts[:-1]}
    return {
        part
        for part in parts
        if part.casefold() in SKIPPED_BY_TOOLS or part.startswith(".") or part.endswith(".egg")
    }


@pytest.fixture(scope="module")
def collected() -> set[Path]:
    """The files that the README's test command collects from, of those that have a test here."""
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stdout[-2000:] + listed.stderr[-2000:]
    collected = {line.partition("::")[0] for line in listed.stdout.splitlines() if "::" in line}
    skipped = set(re.findall(r"SKIPPED \[\d+\] (\S+?):\d+", listed.stdout))
    return {ROOT / name for name in collected | skipped}


def test_every_test_file_is_collected(collected: set[Path]) -> None:
    written = {
        path
        for path in source_files()
        if path.name.startswith("test_") and path.is_relative_to(ROOT / "tests")
    }
    assert len(written) > 50
    assert written <= collected, sorted(str(path) for path in written - collected)


def test_tests_lie_in_tests_alone() -> None:
    elsewhere = [
        path
        for path in source_files()
        if path.name.startswith("test_") and not path.is_relative_to(ROOT / "tests")
    ]
    assert not elsewhere


def test_launch_and_ci_run_that_very_command() -> None:
    launch = (ROOT / "launch.sh").read_text(encoding="utf-8")
    assert '"$python" -m pytest tests --numprocesses 2 "$@"' in launch
    assert '"$python" -m ruff check .' in launch and '"$python" -m mypy' in launch
    assert "exec ./launch.sh test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "./launch.sh test " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ruff_reads_every_file() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(source_files()) <= {Path(line) for line in listed.splitlines()}


def test_mypy_reads_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources, _ = process_options([])
    read = {(ROOT / source.path).resolve() for source in sources if source.path}
    assert set(source_files()) <= read, sorted(str(path) for path in set(source_files()) - read)


def test_no_folder_has_a_name_that_tools_skip() -> None:
    assert not hiding_folders(source_files())


def test_the_check_of_names_can_fail() -> None:
    hidden = [ROOT / "tests" / "dist" / "a.py", ROOT / "eagle3_ds" / "Target" / "b.py", ROOT / ".x" / "c.py"]
    assert hiding_folders(hidden) == {"dist", "Target", ".x"}
    assert not hiding_folders([ROOT / "tests" / "ranks" / "a.py"])


def proven_rows(page: str) -> list[tuple[str, str, str]]:
    """Claim, commands and when they ran last, of each row of the table of what is proven."""
    section = page.partition("## What is proven")[2].partition("\n## ")[0]
    rows = [
        re.split(r"(?<!\\)\|", line.strip().strip("|"))
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return [(claim.strip(), command.strip(), when.strip()) for claim, command, when in rows[2:]]


ROWS = proven_rows((ROOT / "docs" / "proofs.md").read_text(encoding="utf-8"))


def test_the_table_is_there() -> None:
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:60])
def test_every_claim_names_a_command_and_when_it_ran(row: tuple[str, str, str]) -> None:
    _, command, when = row
    commands = re.findall(r"`([^`]+)`", command)
    assert commands, "a claim without a command"
    tests = [
        path for text in commands if text.startswith("pytest ") for path in re.findall(r"tests/\S+\.py", text)
    ]
    modules = [match[1] for text in commands if (match := re.match(r"python -m ([\w.]+)", text))]
    # Tests run in CI; those of servers and a measurement do not, and say when they were run.
    of_servers = [path for path in tests if path.startswith("tests/served/")]
    assert ("CI" in when) == (len(tests) > len(of_servers)), "CI runs the tests of tests/, served apart"
    results = [
        json.loads((ROOT / path).read_text())
        for path in re.findall(r"\]\(\.\./(benchmarks/results/\S+?\.json)\)", command)
    ]
    dates = DATE.findall(when)
    if of_servers:
        assert dates, "when the tests of tests/served ran last"
        del dates[-1]
    assert dates == [result["date"] for result in results], "the dates of the result files"
    assert len(results) == len(modules), "every measurement has its result file beside it"
    for result, name in zip(results, modules, strict=True):
        assert f"python -m {name}" in result["command"]
