"""The command line: `eagle3-ds launch RECIPE` is the main job, the other commands run one stage of it alone.

Everything that can be wrong is judged before the first process starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata

import click

import eagle3_ds
from eagle3_ds.cli.cache import cache
from eagle3_ds.cli.data import data
from eagle3_ds.cli.doctor import doctor
from eagle3_ds.cli.init import init
from eagle3_ds.cli.launch import capture, launch
from eagle3_ds.cli.plan import plan
from eagle3_ds.cli.serve_check import serve_check
from eagle3_ds.cli.stages import evaluate, export, prepare, report
from eagle3_ds.cli.store import store
from eagle3_ds.cli.watch import watch
from eagle3_ds.cli.words import PROGRAM, Commands
from eagle3_ds.launch.logs import NO_BARS

PACKAGES = ("torch", "deepspeed", "transformers")
USAGE, INTERRUPTED = 2, 130


def _show_version(context: click.Context, option: click.Parameter, is_given: bool) -> None:
    """The versions that a report of a fault needs, read from what is installed: nothing is imported."""
    if not is_given or context.resilient_parsing:
        return
    click.echo(f"{PROGRAM} {eagle3_ds.__version__}")
    for package in PACKAGES:
        try:
            click.echo(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            click.echo(f"{package} is not installed")
    context.exit()


@click.group(cls=Commands, subcommand_metavar="COMMAND [RECIPE] [OPTIONS] [section.key=value]...")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="versions of this program, torch, deepspeed and transformers",
)
def commands() -> None:
    """Train EAGLE-3 drafts at long context. `eagle3-ds COMMAND --help` tells a command's options.

    RECIPE is a YAML file, or the name of a shipped one, for example quickstart.
    """


for command in (
    init,
    launch,
    prepare,
    capture,
    evaluate,
    export,
    serve_check,
    report,
    watch,
    doctor,
    data,
    plan,
    store,
    cache,
):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words behind the program's name; None takes those of this process.

    Returns:
        The exit status: 0; 2 after a user's mistake, which is one message without a traceback; 130 after
        Ctrl-C; 75 from a run that was stopped and can be resumed; else the command's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join([PROGRAM, *(word for word in words[:1] if word in commands.commands)])
    if not sys.stderr.isatty():
        # Read when transformers and datasets are imported, which a command does after this.
        os.environ.update({**NO_BARS, **os.environ})
    try:
        return int(commands.main(words, prog_name=PROGRAM, standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        return _refuse(context.command_path if context else name, error.format_message())
    except (ValueError, OSError) as error:
        # What the system refuses (a path too long, a folder of somebody else) is the user's to mend too.
        return _refuse(name, str(error))
    except (KeyboardInterrupt, click.Abort):
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refuse(name: str, message: str) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
