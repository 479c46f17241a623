"""Which architectures vLLM serves EAGLE-3 drafts for, read from the source of an installed vLLM without
importing it: the classes of its registry that have `SupportsEagle3` among their bases.

`python -m judge.vllm_families FOLDER --write` writes eagle3_ds/targets/servers_data.py; FOLDER is
site-packages/vllm.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

FLAG = "SupportsEagle3"
REGISTRY = Path("model_executor", "models", "registry.py")
TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
DATA = Path(__file__).parents[1] / "eagle3_ds" / "targets" / "servers_data.py"


def served_architectures(vllm: Path) -> list[str]:
    """The architectures, by name, whose class has `SupportsEagle3` among its bases, at any distance.

    Raises:
        ValueError: `vllm` is no vLLM, or no class of it has that base.
    """
    registry = vllm / REGISTRY
    if not registry.is_file():
        raise ValueError(f"{vllm} holds no {REGISTRY}: name the folder site-packages/vllm.")
    bases: dict[str, set[str]] = {}
    for file in sorted(registry.parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                # Two files may have a class of one name: of either, all bases count.
                bases.setdefault(node.name, set()).update(ast.unparse(b).split(".")[-1] for b in node.bases)
    found = [name for name, (_, cls) in _registered(registry).items() if _has_base(cls, bases)]
    if not found:
        raise ValueError(f"no class in {registry.parent} has {FLAG} among its bases: vLLM has renamed it.")
    return sorted(found)


def _registered(registry: Path) -> dict[str, tuple[str, str]]:
    """{architecture: (module, class)} of the models that generate text."""
    tree = ast.parse(registry.read_text(encoding="utf-8"))
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in TABLES:
            found |= ast.literal_eval(node.value)
    return found


def _has_base(name: str, bases: dict[str, set[str]]) -> bool:
    seen, waiting = set[str](), [name]
    while waiting:
        name = waiting.pop()
        if name == FLAG:
            return True
        if name not in seen:
            seen.add(name)
            waiting += bases.get(name, ())
    return False


def module_text(architectures: Sequence[str], version: str, day: str) -> str:
    lines = "\n".join(f'        "{name}",' for name in architectures)
    return f'''"""Written by `python -m judge.vllm_families FOLDER --write`: do not edit."""

from __future__ import annotations

VLLM_VERSION = "{version}"
READ_ON = "{day}"
VLLM_ARCHITECTURES = frozenset(
    (
{lines}
    )
)
"""Architectures for which vLLM's own models hand out the hidden states that an EAGLE-3 draft reads."""
'''


def _version(vllm: Path) -> str:
    """From the name of the package's metadata, beside it."""
    names = sorted(path.name for path in vllm.parent.glob("vllm*.dist-info"))
    if not names:
        raise ValueError(f"{vllm.parent} holds no vllm*.dist-info, which names the version.")
    return names[0].removesuffix(".dist-info").split("-")[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m judge.vllm_families", description=__doc__)
    parser.add_argument("folder", type=Path, help="site-packages/vllm")
    parser.add_argument("--write", action="store_true", help=f"write {DATA.name} instead of printing it")
    options = parser.parse_args(arguments)
    text = module_text(
        served_architectures(options.folder), _version(options.folder), date.today().isoformat()
    )
    if options.write:
        DATA.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
