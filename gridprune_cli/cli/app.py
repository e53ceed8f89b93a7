"""The command `gridprune`: its sub-commands, and the one place where a failure becomes a line and an exit code."""

import io
import os
import signal
import sys
import threading
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from gridprune_cli.cli import cache, models
from gridprune_cli.cli.ask import ask
from gridprune_cli.cli.batch import batch
from gridprune_cli.cli.bench import bench
from gridprune_cli.cli.calibrate import calibrate
from gridprune_cli.cli.chat import chat
from gridprune_cli.cli.command import ModelCommand
from gridprune_cli.cli.describe import describe
from gridprune_cli.cli.encode import encode
from gridprune_cli.cli.env import env
from gridprune_cli.cli.evaluate import evaluate
from gridprune_cli.cli.export import export
from gridprune_cli.cli.generate import generate
from gridprune_cli.cli.output import DataStream, notices_on_stderr, set_quiet, to_null
from gridprune_cli.cli.prune import prune
from gridprune_cli.cli.serve import serve
from gridprune_cli.cli.show import show
from gridprune_cli.errors import DOWNLOAD, GridpruneError
from gridprune_cli.text import printable

app = typer.Typer(
    name="gridprune",
    help="Ask questions of images with vision-language models, and pay only for the visual tokens that they need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (ask, chat, batch, encode, prune, generate, export, show, serve, bench, evaluate, calibrate, env):
    name = "eval" if command is evaluate else None  # as a function, `eval` would hide Python's
    app.command(name, epilog=getattr(command, "examples", None), cls=ModelCommand)(command)
app.add_typer(models.app, name="models")
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gridprune {version_of('gridprune')}")
        raise typer.Exit


@app.callback()
def gridprune(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of `gridprune` itself."""


_UsageError = typer.BadParameter.__mro__[1]  # of what the command line itself can get wrong; Typer does not export it


def main() -> None:
    """Runs the command line. Whatever goes wrong ends with one line; `GRIDPRUNE_DEBUG=1` shows where it came from."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has left, as `head` does, ends us quietly
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a script has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    _open_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for those who write programs with it
    set_quiet(False)
    debug = os.environ.get("GRIDPRUNE_DEBUG", "0") not in ("", "0")
    try:
        if sys.stdout is None:  # known before anything is done, whatever the command would print
            raise GridpruneError("stdout is closed; send it somewhere, as to /dev/null")
        with notices_on_stderr():
            code = app(prog_name="gridprune", standalone_mode=False)
        sys.stdout.flush()
        _leave(code)
    except (KeyboardInterrupt, typer.Abort):
        _leave(130)
    except Exception as fault:
        if debug:
            raise
        sys.exit(_report(fault))


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C ends the work in order; a second one, while that lasts, the process at once.

    An exception that is raised amid threads that end, or in a weak reference's callback, would print a traceback.
    """
    signal.signal(signal.SIGINT, _abort)
    raise KeyboardInterrupt


def _abort(number: int, frame: object) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(130)


def _open_streams() -> None:
    """Puts /dev/null in the place of streams that are closed, so that no file that is opened later takes their place.

    Of stdin and stdout Python's own objects stay None, which tells that they are closed.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            to_null(number)
    if sys.stderr is None:  # else `print` would take stdout instead
        sys.stderr = open(2, "w", errors="backslashreplace")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = DataStream(sys.stdout.buffer, sys.stdout.encoding, sys.stdout.line_buffering)


def _leave(code: int | None) -> None:
    """Exits; at once where an interrupted download is left behind, whose threads Python would wait for."""
    if any(thread.name == DOWNLOAD for thread in threading.enumerate()):
        os._exit(code or 0)  # what was printed is out already
    sys.exit(code)


def _report(fault: Exception) -> int:
    """Prints one line about a failure, and gives the exit code."""
    code, text = 1, str(fault)
    if isinstance(fault, GridpruneError):
        code, text = fault.exit_code, describe(fault)
    elif isinstance(fault, _UsageError):
        code, text = 2, fault.format_message().replace(": Value error, ", ": ")  # type: ignore[attr-defined]
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
