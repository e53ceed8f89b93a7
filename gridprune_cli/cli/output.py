"""What every command prints with: data to stdout, everything else to stderr."""

import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from gridprune_cli.cli.describe import with_options
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.text import printable, to_json, visible

T = TypeVar("T")

_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
_quiet = False
_data: TextIO | None = None  # where data goes while sys.stdout is kept from libraries

_log = logging.getLogger("gridprune_cli")
say, warn = _log.info, _log.warning  # one line on stderr; notices stay away where the command is quiet


class _Notices(logging.Handler):
    """Writes what the package logs to stderr, a line each: INFO as it is, WARNING and above as `warning: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        if warning or not _quiet:
            line = printable(with_options(record.getMessage()))
            print(f"warning: {line}" if warning else line, file=sys.stderr, flush=True)


@contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Has what the package logs, here and in its modules, written to stderr, and nowhere else."""
    handler, level, propagate = _Notices(), _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False  # some libraries write all that is logged to stderr, too
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = propagate


def set_quiet(quiet: bool) -> None:
    """Whether notices and progress are left out; warnings and errors stay."""
    global _quiet
    _quiet = quiet


class DataStream(io.TextIOWrapper):
    """A stream for data, whose failures, as of a full disk, are known from those of other files."""

    def __init__(self, file: BinaryIO, encoding: str, line_buffering: bool = False):
        # a terminal without Unicode shows escapes
        super().__init__(file, encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        return self._try(lambda: super(DataStream, self).write(text))

    def flush(self) -> None:
        self._try(super().flush)

    def _try(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except BrokenPipeError:  # the reader has left: this ends us quietly, also where the signal is ignored
            to_null(self.fileno())
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
            raise
        except OSError as fault:
            to_null(self.fileno())  # for what it still holds, which Python writes at the end
            reason = fault.strerror or fault
            raise GridpruneError(f"stdout: can't be written ({reason}); send it where there is room") from fault


def to_null(number: int) -> None:
    """Puts /dev/null in the place of a file descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def stdout() -> TextIO:
    """The stream that data goes to."""
    return _data or sys.stdout


def put(text: str, end: str = "\n") -> None:
    """Text on stdout, at once."""
    print(text, end=end, file=stdout(), flush=True)


@contextmanager
def only_data_on_stdout() -> Iterator[None]:
    """Keeps stdout for data: what libraries print meanwhile, in Python or below it, goes to stderr.

    Nothing is changed where stdout is a terminal, whose reader sees both alike, or closed.
    """
    global _data
    before = sys.stdout
    if _data is not None or before is None or sys.stderr is None or before.isatty():
        yield
        return
    before.flush()
    try:
        number, other = before.fileno(), sys.stderr.fileno()
    except OSError:  # no files behind them, as in tests
        number = other = None
    if number is None or other is None:
        _data = before
    else:
        _data = DataStream(os.fdopen(os.dup(number), "wb"), before.encoding)
        os.dup2(other, number)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout, data, _data = before, _data, None
        if data is not before:
            os.dup2(data.fileno(), before.fileno())
            with suppress(OSError):  # reported already where it was written
                data.close()


def emit_json(*values: object) -> None:
    """Values as a line of JSON each on stdout, at once and whole."""
    text = "\n".join(_json(value, stdout().encoding or "utf-8") for value in values)
    with _undisturbed():
        put(text)


def emit_text(text: str, end: str = "\n") -> None:
    """Text of a model on stdout, to a pipe as to a terminal: what a terminal would obey is made visible."""
    put(visible(text), end)


@contextmanager
def lines_to(path: Path | None) -> Iterator[Callable[[object], None]]:
    """Yields what writes a value as a line of JSON, at once and whole: to the end of a file, or to stdout.

    Raises GridpruneError where the file can't be written.
    """
    if path is None:
        yield emit_json
        return

    def fault(error: OSError) -> GridpruneError:
        return GridpruneError(f"{path}: can't be written ({error.strerror}); check its folder and the disk")

    def write(value: object) -> None:
        rest = memoryview(_json(value, "utf-8").encode() + b"\n")
        try:
            with _undisturbed():
                while rest:
                    rest = rest[os.write(handle, rest) :]
        except OSError as error:
            raise fault(error) from error

    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise fault(error) from error
    try:
        yield write
    finally:
        os.close(handle)


def _json(value: object, encoding: str) -> str:
    text = to_json(value)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a file name that is no text, or a terminal without Unicode
        text = json.dumps(value, allow_nan=False)
    return text


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C takes effect at the end of this, so that a line is written whole or not at all."""
    unheard = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a script may have set it
    if unheard or threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned text on stdout; columns whose title ends in a space lean right."""
    lines = [[title.strip().upper() for title in columns], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [title.endswith(" ") for title in columns]
    for line in lines:
        cells = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)]
        put("  ".join(cells).rstrip())


def confirm(question: str, yes: bool) -> bool:
    """Ask on stderr, unless `yes`. BadInput where there is nobody to ask."""
    import typer

    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise BadInput("pass it to go on without being asked; there is no terminal to ask at", field="yes")
    return typer.confirm(question, err=True)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, where that is a terminal, else a line now and then.

    Yields what to call after each of `total` steps (None: unknown), or with a number of steps, and a text on how it is
    going.
    """
    if _quiet:
        yield lambda steps=1, status="": None
        return
    if not sys.stderr.isatty():
        yield _progress_lines(description, total)
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    # what goes to stdout must get there: only where both are one terminal may the bar be in its way
    console, one = Console(stderr=True), stdout().isatty()
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[status]}", markup=False))
    with Progress(*columns, console=console, transient=True, redirect_stdout=one) as bar:
        task = bar.add_task(description, total=total, status="")
        yield lambda steps=1, status="": bar.update(task, advance=steps, status=status)


def _progress_lines(description: str, total: int | None) -> Callable[..., None]:
    start = last_line = time.monotonic()
    done = 0

    def step(steps: int = 1, status: str = "") -> None:
        nonlocal last_line, done
        done += steps
        now = time.monotonic()
        if now - last_line < _EVERY:
            return
        last_line = now
        left = f"{age((total - done) * (now - start) / done)} left" if total else ""
        counts = f"{done} of {total}" if total else str(done)
        say(f"{description}: {', '.join(filter(None, (counts, status, left)))}")

    return step


def size(count: int) -> str:
    """Bytes for people: `812 B`, `1.1 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(value, 1) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def age(seconds: float) -> str:
    """A time span for people, in its largest whole unit: `12 s`, `3 h`, `40 d`."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def check_target(path: Path | None, setting: str) -> None:
    """Raises BadInput, with the setting, where a file can't be written to `path`, before any work is done for it."""
    if path is None:
        return
    if os.path.isdir(path):
        raise BadInput("a folder; name a file in it", field=setting, value=path)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as fault:  # the name is too long, a folder on the way can't be entered, ...
        raise BadInput(f"can't be written ({fault.strerror}); name another file", field=setting, value=path) from fault
    if not os.path.isdir(path.parent):
        raise BadInput(f"there is no folder {path.parent}; make it first", field=setting, value=path)


def read_stdin(what: str) -> bytes:
    """All of stdin. Raises BadInput where nobody has piped anything into it."""
    return open_stdin(what).read()


def open_stdin(what: str) -> BinaryIO:
    """stdin, to be read. Raises BadInput where nobody has piped anything into it."""
    if sys.stdin is None or sys.stdin.isatty():
        raise BadInput(f"nothing is piped into stdin; give {what} there", place="-")
    return sys.stdin.buffer
