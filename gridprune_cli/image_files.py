"""Image files as bytes: what they may take of memory and time, and reading them. Nothing here needs Pillow."""

import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gridprune_cli.errors import BadInput

MAX_PIXELS = 75_000_000  # of an image: 1.05 GB of memory; GRIDPRUNE_MAX_PIXELS raises it, and what follows with it
MAX_BYTES = 1 << 28  # of a file: 75 million pixels of 3 bytes, as they are
MAX_SECONDS = 8.0  # to decode one image: 10, less what goes by between two looks at the clock

_thread = threading.local()  # of `stop_when`


@dataclass(frozen=True)
class NamedImage:
    """An image file that was read already: its bytes, and what to call it."""

    data: bytes
    name: str


Source = (
    str | Path | bytes | NamedImage
)  # a path, or an image file's bytes, which are called `-` where they have no name


def most_pixels() -> int:
    """MAX_PIXELS, or what the environment sets above it. Raises BadInput where that is no number."""
    setting = os.environ.get("GRIDPRUNE_MAX_PIXELS", "")
    if not setting:
        return MAX_PIXELS
    if not (setting.isascii() and setting.isdecimal() and len(setting) <= 10):
        raise BadInput("not a number of pixels; give one, or unset it", place=f"GRIDPRUNE_MAX_PIXELS={setting[:40]!a}")
    return max(MAX_PIXELS, int(setting))


def scale() -> float:
    """The factor by which the limits of time, memory and file size are raised: that of pixels over MAX_PIXELS."""
    return most_pixels() / MAX_PIXELS


def stop_when(stopped: Callable[[], bool]) -> None:
    """Lets the decoding of this thread end, with BadInput, soon after `stopped` gives True."""
    _thread.stopped = stopped


class Clock:
    """Counts MAX_SECONDS from its construction on, and knows whether its thread is to stop."""

    def __init__(self) -> None:
        self.seconds = MAX_SECONDS * scale()
        self.end = time.monotonic() + self.seconds
        self.stopped: Callable[[], bool] = getattr(_thread, "stopped", bool)

    def check(self) -> None:
        """Raises BadInput when time is up, or when this thread is to stop."""
        if self.stopped():
            raise BadInput("interrupted")
        if time.monotonic() > self.end:
            raise BadInput(f"takes more than {self.seconds:g} s to read; make it smaller, or save it as JPEG or PNG")


def read_image(source: str | Path) -> bytes:
    """The bytes of an image file, or of stdin for `-`, which can be read only once. Nothing is decoded.

    Raises BadInput for a file that is missing, a folder, empty, or larger than MAX_BYTES, and for a pipe into which
    nothing is written for MAX_SECONDS.
    """
    name, most = shown(str(source)), int(MAX_BYTES * scale())
    if name == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise BadInput("stdin is a terminal or closed; pipe an image into it", place="-")
    try:
        if name == "-":
            data = sys.stdin.buffer.read(most + 1)
        else:
            with open(source, "rb", opener=_open_now) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    data = _read_pipe(file.fileno(), most + 1, name)
                else:
                    if status.st_size > most:
                        raise _too_large(name, most)
                    data = file.read(most + 1)
    except FileNotFoundError as error:
        raise BadInput("no such file; check the path", place=name) from error
    except IsADirectoryError as error:
        raise BadInput("a folder, not an image; name a file in it", place=name) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"can't be read ({reason(error)}); check the path", place=name) from error
    if not data:
        raise BadInput("empty, 0 bytes; fetch or export it again", place=name)
    if len(data) > most:
        raise _too_large(name, most)
    return data


def _too_large(name: str, most: int) -> BadInput:
    return BadInput(f"more than {most >> 20} MiB; make it smaller, or raise GRIDPRUNE_MAX_PIXELS", place=name)


def _open_now(path: str, flags: int) -> int:
    """Opens a file; a pipe that no one has opened to write, too, without waiting for that."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _read_pipe(file: int, most: int, name: str) -> bytes:
    """Up to `most` bytes of what is no regular file: a pipe, such as the shell's <(...), or a device."""
    pieces: list[bytes] = []
    clock = Clock()
    while most > 0:
        try:
            piece = os.read(file, min(most, 1 << 20))
        except BlockingIOError:  # who writes it has it open, and has no more yet
            piece = None
        if piece:
            pieces.append(piece)
            most -= len(piece)
            clock = Clock()  # it may well write for longer
        elif piece is not None and pieces:
            break
        elif clock.stopped() or time.monotonic() > clock.end:
            raise BadInput(f"a pipe or device that gives nothing for {clock.seconds:g} s; write to it", place=name)
        else:
            time.sleep(0.02)
    return b"".join(pieces)


def name_of(source: Source) -> str:
    """What an image is called: its path, its name, or `-`."""
    if isinstance(source, NamedImage):
        return source.name
    return "-" if isinstance(source, bytes) else str(source)


def read_source(source: str | Path) -> Source:
    """A path as it is; for `-` the bytes of stdin, so that they can be used more than once."""
    return read_image(source) if str(source) == "-" else source


def shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def reason(error: BaseException) -> str:
    """The message of an error, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())
