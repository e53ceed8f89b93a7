"""Writes docs/commands.md from the help of every command: `python docs/generate_commands.py`.

With `--check` nothing is written, and the exit code is 1 where the file is not what it would be.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("commands.md")
WIDTH = 100
INTRO = """# Commands

The help of every command. This page is written by `python docs/generate_commands.py`; don't edit it.
"""


def page() -> str:
    """The whole page, the same whatever the terminal and the environment."""
    os.environ.pop("TYPER_USE_RICH", None)  # read when typer is imported
    import typer.rich_utils as look
    from typer.main import get_command

    from gridprune_cli.cli.app import app

    look.MAX_WIDTH, look.COLOR_SYSTEM, look.FORCE_TERMINAL = WIDTH, None, False
    command = get_command(app)
    return INTRO + "".join(_section(command, path) for path in _paths(command, ("gridprune",)))


def _paths(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The command line of a command and of all below it."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from _paths(below, (*path, name))


def _section(command: Any, path: tuple[str, ...]) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        command.main([*path[1:], "--help"], prog_name=path[0], standalone_mode=False, terminal_width=WIDTH)
    text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip("\n")
    return f"\n## {' '.join(path)}\n\n```text\n{text}\n```\n"


def main() -> None:
    new = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text("utf-8") != new:
            sys.exit(f"{PAGE.name}: not current; run `python docs/{Path(__file__).name}`")
    else:
        PAGE.write_text(new, "utf-8", newline="\n")


if __name__ == "__main__":
    main()
