"""The command `gridprune`: its sub-commands, and the one place where a failure becomes a line and an exit code."""

import os
import sys

import typer

from gridprune_cli.cli import cache
from gridprune_cli.cli.ask import ask
from gridprune_cli.cli.encode import encode
from gridprune_cli.cli.env import env
from gridprune_cli.cli.generate import generate
from gridprune_cli.cli.models import models
from gridprune_cli.cli.output import printable
from gridprune_cli.cli.prune import prune
from gridprune_cli.cli.show import show
from gridprune_cli.errors import GridpruneError

app = typer.Typer(
    name="gridprune",
    help="Ask questions of images with vision-language models, and pay only for the visual tokens that they need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (ask, encode, prune, generate, show, models, env):
    app.command(epilog=getattr(command, "examples", None))(command)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Runs the command line. A GridpruneError is told in one line; `GRIDPRUNE_DEBUG=1` shows where it came from."""
    try:
        app(prog_name="gridprune")
    except GridpruneError as fault:
        if os.environ.get("GRIDPRUNE_DEBUG"):
            raise
        print(f"gridprune: {printable(str(fault))}", file=sys.stderr)
        sys.exit(fault.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
