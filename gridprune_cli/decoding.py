"""An image file's bytes, decoded to plain RGB within bounds of pixels, time and memory, whatever they hold.

Most decoders read the file in small pieces, and every read checks the clock. The others (WebP, AVIF, JPEG 2000) decode
in one call of C that nothing in the process can stop; and libtiff reports damage on stderr alone. Large files of the
former and all of the latter are decoded in a process of its own, which imports Pillow and nothing else, starts in less
than 0.1 s, and is killed when its time is up.
"""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, cast

import PIL
from PIL import Image, ImageFile, UnidentifiedImageError

from gridprune_cli import bounded
from gridprune_cli.errors import BadInput
from gridprune_cli.image_files import MAX_PIXELS, Clock, most_pixels, reason, scale

MAX_MEMORY = 1_200_000_000  # bytes of address space of the decoder's process
MAX_ASPECT = 200  # longer side over shorter; some image processors refuse more
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10, and each goes over all pixels
BYTES_PER_PIXEL = 14  # at most, until an image processor is done: the picture 4 (Pillow pads RGB), its copies 3 + 4 + 3
MAX_TOGETHER = BYTES_PER_PIXEL * MAX_PIXELS  # of what several images take at the same time; the largest alone does, too

# EPS and its like are left out: reading them starts other programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")

_BAND = 1 << 22  # pixels converted at once
_HEAD = 1 << 16  # bytes within which the first line of the worker ends
_CHUNK = 1 << 9  # bytes of a progressive JPEG between two looks at the clock; a scan of all pixels can take 50
# pixels up to which one call of C takes about a second; more are decoded in a process that can be killed
_ONE_CALL = {"WEBP": 16_000_000, "AVIF": 8_000_000, "JPEG2000": 1_000_000}

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
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, but stuffed bytes, restarts and fill

# Pillow's blocks of 16 MiB are kept by the threads' arenas when a picture is freed; from 32 MiB on they are given back
Image.core.set_block_size(1 << 26)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of damaged files goes to stderr

_switch, _restore, _decoding = threading.Lock(), ExitStack(), 0  # of `_strict`


def decode(data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB pixels of an image file's bytes, the right way up, and notes on what was lost.

    Raises BadInput, in one line without the image's name, on anything that is not a whole image within the bounds.
    """
    return _decode(data, Clock(), _apart)


def size_of(file: bytes | str | Path) -> tuple[int, int]:
    """Width and height that `decode` would give, by the header alone. Raises BadInput where there is none.

    The EXIF turn of a PNG is not heeded: it may lie behind the pixels.
    """
    clock = Clock()
    with _faults("not an image that can be read ({})"), ExitStack() as stack:
        stream: IO[bytes] = _Bytes(file, clock) if isinstance(file, bytes) else stack.enter_context(_File(file, clock))
        with _strict(), Image.open(stream, formats=FORMATS) as image:
            _check_size(image)
            lies = image.format not in ("PNG", "TIFF") and _orientation(image) >= 5  # Pillow turns a TIFF's itself
            return image.size[::-1] if lies else image.size


class _Bytes(io.BytesIO):
    """Bytes in memory; every read checks the clock."""

    def __init__(self, data: bytes, clock: Clock):
        super().__init__(data)
        self.clock = clock

    def read(self, size: int | None = -1, /) -> bytes:
        self.clock.check()
        return super().read(size)


class _File(io.FileIO):
    """A file; every read checks the clock."""

    def __init__(self, path: str | Path, clock: Clock):
        super().__init__(path)
        self.clock = clock

    def read(self, size: int | None = -1, /) -> bytes:
        self.clock.check()
        return super().read(-1 if size is None else size)


def _decode(data: bytes, clock: Clock, apart: Callable[[Image.Image], bool]) -> tuple[Image.Image, tuple[str, ...]]:
    """`decode` by a clock. `apart` says which opened images are decoded in a process of their own."""
    with _faults("damaged or cut short ({}); fetch or export it again"):
        with _strict(), Image.open(_Bytes(data, clock), formats=FORMATS) as image:
            _check_size(image)
            if not apart(image):
                notes = _notes(image)
                if image.info.get("progressive"):
                    _check_scans(data)
                    cast(ImageFile.ImageFile, image).decodermaxblock = _CHUNK
                image.load()
                _check_size(image)  # that of an ICO is known only now
                return _rgb(_turn(image), clock), notes
        return _decode_apart(data, clock)


@contextmanager
def _faults(text: str) -> Iterator[None]:
    """Turns whatever decoders raise into BadInput; `text`, with the reason in its braces, for all but a few kinds."""
    try:
        yield
    except BadInput:
        raise
    except UnidentifiedImageError as error:
        raise BadInput("not an image that can be read; give a JPEG, PNG, WebP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        raise BadInput(f"more than {most_pixels() // 10**6} million pixels; {_SMALLER}") from error
    except MemoryError as error:
        raise BadInput("takes more memory to read than there is for it; make it smaller") from error
    except Exception as error:  # decoders raise nearly everything on a damaged file
        raise BadInput(text.format(reason(error))) from error


_SMALLER = "make it smaller, or raise GRIDPRUNE_MAX_PIXELS"


# ---- a process of its own --------------------------------------------------------------------------------------------


def _apart(image: Image.Image) -> bool:
    """Whether decoding can't be bounded in this process. libtiff reports damage on stderr, and goes on."""
    tiles = getattr(image, "tile", ())
    return any(tile[0] == "libtiff" for tile in tiles) or (
        image.width * image.height > _ONE_CALL.get(image.format or "", most_pixels())
    )


def _decode_apart(data: bytes, clock: Clock) -> tuple[Image.Image, tuple[str, ...]]:
    limits = int(MAX_MEMORY * scale()), int(clock.seconds) + 1
    pillow = str(Path(cast(str, PIL.__file__)).resolve().parents[1])
    # files, not pipes: the worker needs no one to feed it, and complaints that would fill its file are left out
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as complaints:
        file.write(data)
        file.seek(0)
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # address space that threads reserve counts as memory
        worker = bounded.start(__name__, *limits, paths=[pillow], stdin=file, stderr=complaints, env=environment)
        with worker:
            try:
                out = _output(worker, clock)
            except BaseException:
                worker.kill()
                raise
        complaints.seek(0)
        complained = complaints.read().decode(errors="replace").splitlines()
    try:
        head, _, _ = out[:_HEAD].partition(b"\n")
        answer = json.loads(head)
    except ValueError:
        why = "; ".join([f"its decoder ended with {worker.returncode}", *complained[-1:]])
        raise BadInput(f"damaged ({why}); fetch or export it again") from None
    if "fault" in answer:
        raise BadInput(answer["fault"])
    if complained:
        raise BadInput(f"damaged ({' '.join(complained[0].split())}); fetch or export it again")
    return Image.frombytes("RGB", tuple(answer["size"]), memoryview(out)[len(head) + 1 :]), tuple(answer["notes"])


def _output(worker: "subprocess.Popen[bytes]", clock: Clock) -> bytes:
    """All that the worker writes. Raises BadInput when time is up."""
    while True:
        clock.check()
        with suppress(subprocess.TimeoutExpired):
            return worker.communicate(timeout=0.2)[0]


def serve(memory: int, seconds: int) -> None:
    """The worker: from stdin the bytes of an image file; to stdout a line of JSON, then the rows of RGB pixels.

    `memory` bounds its address space, and `seconds` its time on a CPU, should the one who started it be gone.
    """
    from PIL import AvifImagePlugin

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C ends it at once, even in C
    bounded.limit(AS=memory, CPU=seconds, FSIZE=1 << 16)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2
    data, out = sys.stdin.buffer.read(), sys.stdout.buffer
    try:
        image, notes = _decode(data, Clock(), lambda image: False)
    except BadInput as fault:
        out.write(json.dumps({"fault": str(fault)}).encode())
        return
    out.write(json.dumps({"size": image.size, "notes": notes}).encode() + b"\n")
    for band, _ in _bands(image):
        out.write(band.tobytes())


# ---- pixels ----------------------------------------------------------------------------------------------------------


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow with strict settings, which are the whole process's: another library may have set it to pass cut files.

    Threads may decode at the same time: the first of them sets, the last sets back.
    """
    global _decoding
    limit = most_pixels()
    with _switch:
        if not _decoding:
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what matters is raised or noted; the rest would fill stderr
            _restore.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            _restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = limit  # Pillow raises above twice that, for the image in an ICO, too
        _decoding += 1
    try:
        yield
    finally:
        with _switch:
            _decoding -= 1
            if not _decoding:
                _restore.close()


def _check_size(image: Image.Image) -> None:
    """Raises BadInput on an image beyond MAX_PIXELS or MAX_ASPECT, or without pixels."""
    width, height = image.size
    most = most_pixels()
    if min(width, height) < 1:
        raise BadInput(f"{width} x {height} pixels; give an image with pixels")
    if width * height > most:
        raise BadInput(f"{width} x {height} pixels, more than {most // 10**6} million; {_SMALLER}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(f"{width} x {height} pixels, longer than {MAX_ASPECT} : 1; crop it")


def _check_scans(data: bytes) -> None:
    """Raises BadInput on a JPEG of more than MAX_SCANS scans, found from marker to marker."""
    scans = place = 0
    while (marker := _MARKER.search(data, place)) and marker[0] != b"\xff\xd9":
        place = marker.start() + 2
        if marker[0] == b"\xff\xd8":
            continue
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise BadInput(f"a progressive JPEG of more than {MAX_SCANS} scans; save it again, with fewer")
        place += max(2, int.from_bytes(data[place : place + 2], "big"))


def _notes(image: Image.Image) -> tuple[str, ...]:
    """That only the first frame or page is taken. How many there are is not asked: counting reads all of the file."""
    if not getattr(image, "is_animated", False) or image.format == "MPO":  # a camera's JPEG with previews beside it
        return ()
    return ("several pages: the first is taken",) if image.format == "TIFF" else ("animated: the first frame is taken",)


def _turn(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
    """As EXIF counts it, 1 to 8; 1 where it says nothing that makes sense."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises nearly everything, and the pixels are whole
        return 1
    return value if value in _UPRIGHT else 1


def _rgb(image: Image.Image, clock: Clock) -> Image.Image:
    """An image in 8-bit RGB, transparency over white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    canvas = Image.new("RGB", image.size, "white")
    for band, top in _bands(image):  # whole copies would take several times the memory of the picture
        clock.check()
        if band.mode.startswith(("I", "F")):
            canvas.paste(_grey8(band), (0, top))
        elif band.has_transparency_data:
            band = band.convert("RGBA")
            canvas.paste(band, (0, top), band.getchannel("A"))
        else:
            canvas.paste(band.convert("RGB"), (0, top))
    return canvas


def _bands(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """An image in bands of its whole width, each with the y of its top; a small one as it is."""
    height = max(1, _BAND // image.width)
    if height >= image.height:
        yield image, 0
        return
    for top in range(0, image.height, height):
        yield image.crop((0, top, image.width, min(image.height, top + height))), top


def _grey8(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0..65535), or floats in 0..1, scaled to 8 bits and rounded. ValueError on other ranges."""
    top = 1.0 if image.mode == "F" else 65535.0
    whole = image.convert("I") if image.mode.startswith("I") else None
    wide = image if whole is None else whole.convert("F")
    low, high = cast(tuple[float, float], wide.getextrema())
    if not 0 <= low <= high <= top:
        raise ValueError(f"grey values of {low} to {high}, not within 0 to {top:g}")
    grey = wide.point(lambda value: value * (255 / top) + 0.5).convert("L")
    clear = image.info.get("transparency")  # of a PNG: the one grey value that is transparent
    if whole is not None and isinstance(clear, int):
        grey.paste(255, mask=whole.point([255 * (value == clear) for value in range(1 << 16)], "L"))
    return grey
