"""Image files: named, searched for, read within bounds, and decoded."""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gridprune_cli.decoding import BYTES_PER_PIXEL, MAX_BYTES, Clock, decode, most_pixels, reason, scale, size_of
from gridprune_cli.errors import BadInput

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".ico", ".tga"),
)

Source = str | Path | bytes  # a path, or the bytes of an image file


@dataclass(frozen=True)
class Picture:
    """An image that was read: 8-bit RGB pixels, sha256 of the file's bytes, its name as given, and notes on losses."""

    image: Image.Image
    sha256: str
    name: str
    notes: tuple[str, ...] = ()


def read_image(source: str | Path) -> bytes:
    """The bytes of an image file, or of stdin for `-`, which can be read only once. Nothing is decoded.

    Raises BadInput for a file that is missing, a folder, empty, or larger than MAX_BYTES, and for a pipe into which
    nothing is written for MAX_SECONDS.
    """
    name, most = _shown(str(source)), int(MAX_BYTES * scale())
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


def read_source(source: str | Path) -> Source:
    """A path as it is; for `-` the bytes of stdin, so that they can be used more than once."""
    return read_image(source) if str(source) == "-" else source


def identify(source: Source) -> tuple[str, str, bytes]:
    """sha256 (hex) of an image file's bytes, its name (`-` for bytes), and the bytes. Nothing is decoded.

    Raises BadInput as `read_image` does.
    """
    name, data = ("-", source) if isinstance(source, bytes) else (str(source), read_image(source))
    return hashlib.sha256(data).hexdigest(), name, data


def load_image(source: Source, name: str | None = None) -> Picture:
    """Decode an image file. `name` is what to call it, if not its path.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits; of several frames or
    pages the first is taken, with a note. Colour profiles are not applied. Raises BadInput, in one line, on anything
    that is not a whole image within the bounds of `decoding`.
    """
    sha256, path, data = identify(source)
    try:
        image, notes = decode(data)
    except BadInput as fault:
        raise fault.at(_shown(name or path)) from fault
    return Picture(image, sha256, name or path, notes)


def measure(source: Source, name: str = "-") -> tuple[int, int]:
    """Width and height that `load_image` would give, by the header alone. Raises BadInput where there is none.

    The EXIF turn of a PNG is not heeded: it may lie behind the pixels.
    """
    try:
        return size_of(source)
    except BadInput as fault:
        raise fault.at(_shown(name if isinstance(source, bytes) else str(source))) from fault


def memory_of(source: Source) -> int:
    """Bytes of memory, at most about, that reading an image and preparing it for a model take, by file and header."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            status = os.stat(source)
        except (OSError, ValueError):
            return 0  # there is nothing to read
        if not stat.S_ISREG(status.st_mode):
            return BYTES_PER_PIXEL * most_pixels()  # a pipe can be read only once
        size = status.st_size
    try:
        width, height = size_of(source)
    except BadInput:
        width = height = 0
    return min(size, int(MAX_BYTES * scale())) + BYTES_PER_PIXEL * width * height


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given; of each folder, every image below it by suffix, sorted.

    Hidden files, linked folders, and what is no file (pipes, sockets, devices) are left out of folders.
    Raises BadInput on a folder that can't be listed, or holds no image.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            images.append(path)
            continue
        below = sorted(_below(path))
        if not below:
            raise BadInput("no image in this folder; name another, or the files themselves", place=_shown(str(path)))
        images += below
    return images


def _below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise BadInput(f"can't be listed ({reason(error)}); check its permissions", place=_shown(str(error.filename)))

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(parent, name)
            for name in names
            if not name.startswith(".")
            and os.path.splitext(name)[1].lower() in SUFFIXES
            and _may_be_read(os.path.join(parent, name))
        )


def _may_be_read(path: str) -> bool:
    """Whether it is a file, or can't be looked at: then reading it gives the error."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)
