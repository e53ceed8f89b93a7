"""A process of the package's own, for work that only the system can bound: it may run on, or take all memory."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def start(module: str, *arguments: object, paths: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Runs `module.serve(*arguments)` in a new interpreter, which imports from the package's folder and `paths` alone.

    Neither site nor the environment's settings of Python are heeded, and no bytecode is written: Python keeps what it
    wrote of a `.pyc` up to a limit of FSIZE, and every later import fails by it. `options` are those of Popen; stdout
    is a pipe.
    """
    folders = [str(Path(__file__).resolve().parents[1]), *paths]
    code = f"import sys; sys.path[:0] = {folders!r}; from {module} import serve; serve(*{arguments!r})"
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, **options)


def limit(**limits: int) -> None:
    """Sets limits of this process: AS and FSIZE in bytes, of its memory and of a file it writes; CPU in seconds."""
    import resource

    for name, most in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is set already
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
