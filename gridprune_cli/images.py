"""Image files: named, searched for, read within bounds, and decoded."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gridprune_cli.decoding import BYTES_PER_PIXEL, decode, size_of
from gridprune_cli.errors import BadInput
from gridprune_cli.image_files import (
    MAX_BYTES,
    NamedImage,
    Source,
    most_pixels,
    name_of,
    read_image,
    reason,
    scale,
    shown,
)

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".ico", ".tga"),
)


@dataclass(frozen=True)
class Picture:
    """An image that was read: 8-bit RGB pixels, sha256 of the file's bytes, its name as given, and notes on losses."""

    image: Image.Image
    sha256: str
    name: str
    notes: tuple[str, ...] = ()


def identify(source: Source) -> tuple[str, str, bytes]:
    """sha256 (hex) of an image file's bytes, its name (`-` for bytes), and the bytes. Nothing is decoded.

    Raises BadInput as `read_image` does.
    """
    content = _content(source)
    data = content if isinstance(content, bytes) else read_image(content)
    return hashlib.sha256(data).hexdigest(), name_of(source), data


def _content(source: Source) -> bytes | str | Path:
    """The bytes of an image file, or its path where it was not read."""
    return source.data if isinstance(source, NamedImage) else source


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
        raise fault.at(shown(name or path)) from fault
    return Picture(image, sha256, name or path, notes)


def measure(source: Source, name: str = "-") -> tuple[int, int]:
    """Width and height that `load_image` would give, by the header alone. Raises BadInput where there is none.

    The EXIF turn of a PNG is not heeded: it may lie behind the pixels.
    """
    try:
        return size_of(_content(source))
    except BadInput as fault:
        raise fault.at(shown(name if isinstance(source, bytes) else name_of(source))) from fault


def memory_of(source: Source) -> int:
    """Bytes of memory, at most about, that reading an image and preparing it for a model take, by file and header."""
    content = _content(source)
    if isinstance(content, bytes):
        size = len(content)
    else:
        try:
            status = os.stat(content)
        except (OSError, ValueError):
            return 0  # there is nothing to read
        if not stat.S_ISREG(status.st_mode):
            return BYTES_PER_PIXEL * most_pixels()  # a pipe can be read only once
        size = status.st_size
    try:
        width, height = size_of(content)
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
            raise BadInput("no image in this folder; name another, or the files themselves", place=shown(str(path)))
        images += below
    return images


def _below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise BadInput(f"can't be listed ({reason(error)}); check its permissions", place=shown(str(error.filename)))

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
