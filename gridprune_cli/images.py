"""Image files: opened, checked, turned the right way up, and made plain RGB."""

import hashlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, ImageFile, UnidentifiedImageError

from gridprune_cli.errors import BadInput

MAX_BYTES = 1 << 30
MAX_PIXELS = 178_956_970  # 512 MiB of RGB; from here on Pillow, too, takes a file for a decompression bomb
MAX_ASPECT = 200  # longer side over shorter; some image processors refuse more

# EPS and its like are left out: reading them starts other programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".ico", ".tga"),
)

Source = str | Path | bytes  # a path, or the bytes of an image file

_switch, _restore, _decoding = threading.Lock(), ExitStack(), 0  # of `_strict`

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """An image that was read: 8-bit RGB pixels, sha256 of the file's bytes, its name as given, and what was lost."""

    image: Image.Image
    sha256: str
    name: str
    notes: tuple[str, ...] = ()


def read_image(source: str | Path) -> bytes:
    """The bytes of an image file, or of stdin for `-`, which can be read only once. Nothing is decoded.

    Raises BadInput for a file that is missing, a folder, empty, or larger than MAX_BYTES.
    """
    name = _shown(str(source))
    if name == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise BadInput("-: stdin is a terminal or closed; pipe an image into it")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(source, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise BadInput(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise BadInput(f"{name}: a folder, not an image; name a file in it") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: can't be read ({_reason(error)}); check the path") from error
    if not data:
        raise BadInput(f"{name}: empty, 0 bytes; fetch or export it again")
    if len(data) > MAX_BYTES:
        raise BadInput(f"{name}: more than {MAX_BYTES >> 20} MiB; make it smaller")
    return data


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
    that is not a whole image of 1 to MAX_PIXELS pixels with sides of at most MAX_ASPECT : 1.
    """
    sha256, given, data = identify(source)
    name = name or given
    try:
        with _strict(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name)
            notes = _notes(image)
            image.load()
            upright = _rgb(_turn(image))
    except BadInput:
        raise
    except UnidentifiedImageError as error:
        raise BadInput(f"{_shown(name)}: not an image that can be read; give a JPEG, PNG, WebP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        raise BadInput(f"{_shown(name)}: more than {MAX_PIXELS // 10**6} million pixels; make it smaller") from error
    except MemoryError as error:
        raise BadInput(f"{_shown(name)}: too large for this machine's memory; make it smaller") from error
    except Exception as error:  # decoders raise nearly everything on a damaged file
        raise BadInput(f"{_shown(name)}: damaged or cut short ({_reason(error)}); fetch or export it again") from error
    return Picture(upright, sha256, name, notes)


def measure(source: Source, name: str = "-") -> tuple[int, int]:
    """Width and height that `load_image` would give, by the header alone. Raises BadInput where there is none.

    The EXIF turn of a PNG is not heeded: it may lie behind the pixels.
    """
    file, name = (io.BytesIO(source), name) if isinstance(source, bytes) else (source, str(source))
    try:
        with _strict(), Image.open(file, formats=FORMATS) as image:
            _check_size(image, name)
            lies = image.format not in ("PNG", "TIFF") and _orientation(image) >= 5  # Pillow turns a TIFF's itself
            return image.size[::-1] if lies else image.size
    except BadInput:
        raise
    except Exception as error:  # decoders raise nearly everything on a damaged file
        raise BadInput(f"{_shown(name)}: not an image that can be read ({_reason(error)})") from error


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given; of each folder, every image below it by suffix, sorted, without hidden files or linked folders.

    Raises BadInput on a folder that can't be listed, or holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            found.append(path)
            continue
        below = sorted(_below(path))
        if not below:
            raise BadInput(f"{_shown(str(path))}: no image in this folder; name another, or the files themselves")
        found += below
    return found


def _below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise BadInput(f"{_shown(str(error.filename))}: can't be listed ({_reason(error)}); check its permissions")

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        )


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow's settings are the whole process's: another library may have told it to let cut files pass.

    Threads may decode at the same time: the first of them sets, the last sets back.
    """
    global _decoding
    with _switch:
        if not _decoding:
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what matters is raised or noted; the rest would fill stderr
            _restore.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _decoding += 1
    try:
        yield
    finally:
        with _switch:
            _decoding -= 1
            if not _decoding:
                _restore.close()


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    size = f"{_shown(name)}: {width} x {height} pixels"
    if min(width, height) < 1:
        raise BadInput(f"{size}; give an image with pixels")
    if width * height > MAX_PIXELS:
        raise BadInput(f"{size}, more than {MAX_PIXELS // 10**6} million; make it smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(f"{size}, longer than {MAX_ASPECT} : 1; crop it")


def _notes(image: Image.Image) -> tuple[str, ...]:
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # a camera's JPEG with previews beside the picture
        return ()
    return (
        (f"several pages: first of {frames}",) if image.format == "TIFF" else (f"animated: first of {frames} frames",)
    )


def _turn(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
    """As EXIF counts it, 1 to 8; 1 where it says nothing that makes sense."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises nearly everything, and the pixels are whole
        return 1
    return found if found in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _grey8(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0..65535), or floats in 0..1, scaled to 8 bits and rounded. ValueError on other ranges."""
    top = 1.0 if image.mode == "F" else 65535.0
    wide = image.convert("I").convert("F") if image.mode.startswith("I") else image
    low, high = cast(tuple[float, float], wide.getextrema())
    if not 0 <= low <= high <= top:
        raise ValueError(f"grey values of {low} to {high}, not within 0 to {top:g}")
    return wide.point(lambda value: value * (255 / top) + 0.5).convert("L")


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())
