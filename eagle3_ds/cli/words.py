"""What all commands share: how they are found, the recipe and its overrides, and how they write.

torch, transformers and the rest are imported by a command when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from eagle3_ds.config import Recipe, read_recipe
from eagle3_ds.say import telling

if TYPE_CHECKING:
    from rich.console import Console

Function = TypeVar("Function", bound=Callable[..., Any])
logger = logging.getLogger(__name__)

PROGRAM = "eagle3-ds"
CALLED = "EAGLE3_DS_CALLED"
"""The environment variable in which launch.sh says how it was called, for commands that can be copied."""
LEVELS = ("debug", "info", "warning", "error")
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Commands(click.Group):
    """A group that names all its commands, and the nearest, when it is asked for one that it has not.

    Args:
        what: a command is called so in messages.
    """

    def __init__(self, *arguments: Any, what: str = "command", **options: Any) -> None:
        settings = {"no_args_is_help": True, "context_settings": SETTINGS}
        super().__init__(*arguments, **{**settings, **options})
        self.what = what

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a run needs them, not by the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each with its whole meaning, which click would cut to a line."""
        meanings = [
            (name, command.short_help or (command.help or "").partition("\n\n")[0])
            for name, command in self.commands.items()
        ]
        with formatter.section(f"{self.what.capitalize()}s"):
            formatter.write_dl(meanings)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(
                f"there is no {self.what} {name!r}.{hint} "
                f"{self.what.capitalize()}s: {', '.join(self.commands)}.",
                ctx,
            )
        return super().resolve_command(ctx, args)


def recipe_words(function: Function) -> Function:
    """The recipe, by its path or the name of a shipped one, and overrides anywhere behind it."""
    overrides = click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
    return click.argument("recipe", metavar="RECIPE")(overrides(function))


def log_level(function: Function) -> Function:
    """`--log-level`, of every command that runs something."""
    return click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        help="least important lines to tell, e.g. --log-level warning (else the recipe's logging.level)",
    )(function)


@contextmanager
def telling_recipe(path: str, overrides: Sequence[str], level: str | None, *more: str) -> Iterator[Recipe]:
    """The recipe with its overrides, while what the package logs is shown as the recipe or `--log-level`
    says.

    The level becomes an override, so that the ranks of the run follow it too.
    """
    chosen = [f"logging.level={level}"] if level is not None else []
    recipe, told = read_recipe(path, [*overrides, *more, *chosen])
    with telling(recipe.logging.level):
        for line in told:
            logger.info("%s", line)
        yield recipe


def terminal() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console(soft_wrap=True)


def write(console: Console, text: str) -> None:
    """Plain text: brackets in a path are not markup."""
    console.print(text, markup=False, highlight=False)
