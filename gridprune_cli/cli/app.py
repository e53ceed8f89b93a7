"""The command `gridprune`: its sub-commands, and the one place where a failure becomes a line and an exit code."""

import os
import signal
import sys
import threading
from typing import Any

import typer
from typer.core import TyperCommand

from gridprune_cli.cli import cache
from gridprune_cli.cli.ask import ask
from gridprune_cli.cli.batch import batch
from gridprune_cli.cli.bench import bench
from gridprune_cli.cli.encode import encode
from gridprune_cli.cli.env import env
from gridprune_cli.cli.evaluate import evaluate
from gridprune_cli.cli.export import export
from gridprune_cli.cli.generate import generate
from gridprune_cli.cli.models import models
from gridprune_cli.cli.output import only_data_on_stdout, printable, set_quiet
from gridprune_cli.cli.prune import prune
from gridprune_cli.cli.show import show
from gridprune_cli.errors import DOWNLOAD, GridpruneError


class _Command(TyperCommand):
    """A command that runs models. Its help is printed before it is invoked."""

    def invoke(self, ctx: Any) -> Any:
        with only_data_on_stdout():
            return super().invoke(ctx)


app = typer.Typer(
    name="gridprune",
    help="Ask questions of images with vision-language models, and pay only for the visual tokens that they need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (ask, batch, encode, prune, generate, export, show, bench, models, env):
    app.command(epilog=getattr(command, "examples", None), cls=_Command)(command)
app.command("eval", epilog=evaluate.examples, cls=_Command)(evaluate)  # type: ignore[attr-defined]
app.add_typer(cache.app, name="cache")


_UsageError = typer.BadParameter.__mro__[1]  # of what the command line itself can get wrong; Typer does not export it


def main() -> None:
    """Runs the command line. Whatever goes wrong is told in one line; `GRIDPRUNE_DEBUG=1` shows where it came from."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has left, as `head` does, ends us quietly
    set_quiet(False)
    debug = os.environ.get("GRIDPRUNE_DEBUG", "0") not in ("", "0")
    try:
        _leave(app(prog_name="gridprune", standalone_mode=False))
    except (KeyboardInterrupt, typer.Abort):
        _leave(130)
    except Exception as fault:
        if debug:
            raise
        sys.exit(_tell(fault))


def _leave(code: int | None) -> None:
    """Exits; at once where an interrupted download is left behind, whose threads Python would wait for."""
    if any(thread.name == DOWNLOAD for thread in threading.enumerate()):
        os._exit(code or 0)  # what was printed is out already
    sys.exit(code)


def _tell(fault: Exception) -> int:
    """Prints one line about a failure, and gives the exit code."""
    code, text = 1, str(fault)
    if isinstance(fault, GridpruneError):
        code = fault.exit_code
    elif isinstance(fault, _UsageError):
        code, text = 2, fault.format_message()  # type: ignore[attr-defined]
        context = getattr(fault, "ctx", None)
        if text and context:
            text = f"{text.rstrip('.')}; see `{context.command_path} --help`"
    else:
        first = (text.splitlines() or [""])[0]
        text = f"unexpected {type(fault).__name__}: {first}; GRIDPRUNE_DEBUG=1 shows where"
    if text:  # empty where the help was printed in its place
        print(f"gridprune: {printable(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
