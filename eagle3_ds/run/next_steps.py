"""What to do with a finished run: commands that can be copied as they are, each for this run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.config import RESOLVED, EvalSection, Recipe
from eagle3_ds.export.card import vllm_words
from eagle3_ds.run.summary import exports

PUSHED = "OWNER/NAME"
SERVER = "http://localhost:8000"
"""Where `vllm serve` listens if it is not told otherwise."""


@dataclass(frozen=True)
class NextStep:
    """A command, and in words what it does."""

    what: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.words)


def next_steps(recipe: Recipe, program: str) -> list[NextStep]:
    """The commands for a finished run, which read the recipe that it has left in its output folder.

    Args:
        program: how the user calls this program, `eagle3-ds` or a path of launch.sh.
    """
    folder = Path(recipe.output_dir)
    resolved = str(folder / RESOLVED)

    def ours(what: str, command: str, *words: str) -> NextStep:
        return NextStep(what, (program, command, *words))

    looked_at = ours(
        "look at the whole run, as a page too", "watch", str(folder), "--html", str(folder / "run.html")
    )
    drafts = exports(folder)
    if not drafts:
        exported = ours(
            "export the draft, to serve or publish it", "export", resolved, "export.formats=[vllm]"
        )
        return [*_evaluation(recipe, program, resolved), exported, looked_at]
    draft = next(iter(drafts.values()))
    serving = vllm_words(
        _served_name(recipe.target.path),
        str(draft),
        recipe.target.dtype,
        recipe.eval.draft_tokens,
        recipe.draft.algorithm,
    )
    return [
        *_evaluation(recipe, program, resolved),
        ours(
            "does a real vLLM serve it as it was trained? (--python P, where another Python has vLLM)",
            "serve-check",
            resolved,
        ),
        NextStep("serve it", tuple(serving)),
        ours("its acceptance and speed on that server", "evaluate", resolved, "--server", SERVER),
        ours(f"publish it on the Hugging Face hub as {PUSHED}", "export", resolved, "--push", PUSHED),
        looked_at,
    ]


def _evaluation(recipe: Recipe, program: str, resolved: str) -> Sequence[NextStep]:
    """Evaluating the draft again, or for the first time where the recipe asks for none; nothing where no
    data are held out.
    """
    if recipe.eval.num_prompts:
        return [NextStep("evaluate it again", (program, "evaluate", resolved))]
    if not recipe.data.heldout and not recipe.data.heldout_fraction:
        return []
    asked = f"eval.num_prompts={EvalSection().num_prompts}"
    return [NextStep("evaluate it", (program, "evaluate", resolved, asked))]


def _served_name(target: str) -> str:
    """The target as a server is told of it: a shell does not expand the `~` of a quoted path."""
    path = Path(target).expanduser()
    return str(path) if path.is_dir() else target
