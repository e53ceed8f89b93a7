"""Small image files that ask for much, made by code, and what each of them takes to be refused or read.

    python -m tests.fuzz.bombs [NAME...]

prints a table: the bytes of the file, seconds, megabytes above a process that has imported the reader (its worker
process, if any, included), and the outcome. It exits with 1 if one takes more than it may or ends with a traceback.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8660  # of the largest square that is read
SECONDS, MEGABYTES = 10.0, 1500.0

# ---- formats, written by hand ----------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(size: int) -> bytes:
    """`size` zero bytes, deflated."""
    packer, piece = zlib.compressobj(9), bytes(1 << 20)
    packed = [packer.compress(piece) for _ in range(size >> 20)]
    return b"".join([*packed, packer.compress(bytes(size & 0xFFFFF)), packer.flush()])


def png(side: int, bits: int, colour: int, *, before: bytes = b"", interlaced: bool = False, data: bytes | None = None):
    """A PNG of zeros. `colour` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    pixel = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = 0
    for x, y, across, down in passes:
        width, height = -(-(side - x) // across), -(-(side - y) // down)
        raw += height * (1 + -(-width * pixel // 8))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if colour == 3 else b""
    body = chunk(b"IDAT", zeros(raw)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + head + palette + before + body + chunk(b"IEND")


def webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour: five codes of one symbol each, and no bit for any pixel."""
    bits = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (1, 1), (0, 3), (0, 1), (0, 1), (0, 1)]
    for symbol in (10, 20, 30, 128, 0):  # green, red, blue, alpha, distance
        bits += [(1, 1), (0, 1), (1, 1), (symbol, 8)]
    value = length = 0
    for number, count in bits:
        value, length = value | number << length, length + count
    data = value.to_bytes(-(-length // 16) * 2, "little")
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def scans(side: int, times: int, mode: str = "RGB") -> bytes:
    """A progressive JPEG whose last scan comes `times` more."""
    data = saved(Image.new(mode, (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + data[-2:]


def tiff(mode: str, side: int, compression: str | None = "tiff_adobe_deflate") -> bytes:
    return saved(Image.new(mode, (side, side)), "TIFF", compression=compression)


def directories(number: int, *, loop: bool = False) -> bytes:
    """A TIFF of one pixel, and more directories, each of one tag; `loop`: the last leads to the second."""
    file = saved(Image.new("L", (1, 1)), "TIFF")
    start = struct.unpack("<I", file[4:8])[0]
    link = start + 2 + 12 * struct.unpack("<H", file[start : start + 2])[0]
    first, size = len(file), 18
    more = b"".join(
        struct.pack("<HHHIII", 1, 256, 4, 1, 1, first + size * (n + 1) if n + 1 < number else first * loop)
        for n in range(number)
    )
    return file[:link] + struct.pack("<I", first) + file[link + 4 :] + more


def gif(frames: int, side: int = 1) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return head + (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\x00") * frames + b";"


def bmp(side: int, runs: bytes) -> bytes:
    """A BMP of 8 bits, run-length coded."""
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(info) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + info + bytes(1024) + runs


def ico(image: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(image), 22) + image


def damaged_fax() -> bytes:
    """A TIFF in Group 4 of 1000 x 1000, of noise, with some of its bytes changed: libtiff tells, and goes on."""
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 2, (1000, 1000)).astype(bool))
    data = bytearray(saved(image, "TIFF", compression="group4"))
    for place in noise.integers(200, len(data) - 400, 40):
        data[place] = noise.integers(256)
    return bytes(data)


# ---- the bombs -------------------------------------------------------------------------------------------------------

BOMBS: dict[str, Callable[[], bytes]] = {
    "webp 13300 x 13300, lossless": lambda: webp(13300, 13300),
    "webp 16384 x 16384, lossless": lambda: webp(16384, 16384),
    "webp at the limit, lossless, alpha": lambda: webp(SIDE, SIDE),
    "webp 4000 x 4000, lossless, alpha": lambda: webp(4000, 4000),
    "png that claims 2^31 - 1 squared": lambda: png(2**31 - 1, 1, 0, data=chunk(b"IDAT", zeros(9))),
    "png 13300 x 13300, 1 bit": lambda: png(13300, 1, 0),
    "png at the limit, RGB": lambda: png(SIDE, 8, 2),
    "png at the limit, RGBA": lambda: png(SIDE, 8, 6),
    "png at the limit, RGBA, interlaced": lambda: png(SIDE, 8, 6, interlaced=True),
    "png at the limit, RGBA of 16 bits": lambda: png(SIDE, 16, 6),
    "png at the limit, grey of 16 bits": lambda: png(SIDE, 16, 0),
    "png at the limit, grey of 16 bits, tRNS": lambda: png(SIDE, 16, 0, before=chunk(b"tRNS", bytes(2))),
    "png at the limit, palette, tRNS": lambda: png(SIDE, 8, 3, before=chunk(b"tRNS", bytes(256))),
    "png at the limit, grey and alpha": lambda: png(SIDE, 8, 4),
    "png at the limit, 1 bit": lambda: png(SIDE, 1, 0),
    "png whose pixels go on": lambda: png(64, 8, 2, data=chunk(b"IDAT", zeros(100 << 20))),
    "png of one colour profile of 100 MB": lambda: png(8, 8, 2, before=chunk(b"iCCP", b"a\0\0" + zeros(100 << 20))),
    "png of a text of 100 MB": lambda: png(8, 8, 2, before=chunk(b"zTXt", b"a\0\0" + zeros(100 << 20))),
    "png of 100 texts of 1 MB": lambda: png(8, 8, 2, before=chunk(b"zTXt", b"a\0\0" + zeros(1 << 20)) * 100),
    "png of 1,000,000 chunks": lambda: png(8, 8, 2, before=chunk(b"prVt") * 1_000_000),
    "png of 1,000,000 empty IDAT": lambda: png(8, 8, 2, data=chunk(b"IDAT") * 1_000_000 + chunk(b"IDAT", zeros(200))),
    "jpeg that claims 65500 x 65500": lambda: (
        (data := saved(Image.new("L", (8, 8)), "JPEG"))[: (place := data.index(b"\xff\xc0") + 5)]
        + struct.pack(">HH", 65500, 65500)
        + data[place + 4 :]
    ),
    "jpeg at the limit": lambda: saved(Image.new("RGB", (SIDE, SIDE)), "JPEG"),
    "jpeg at the limit, progressive": lambda: scans(SIDE, 0),
    "jpeg at the limit, progressive, CMYK": lambda: scans(SIDE, 0, "CMYK"),
    "jpeg at the limit, 90 scans": lambda: scans(SIDE, 80),
    "jpeg 3000 x 3000, 2,000 scans": lambda: scans(3000, 2000),
    "jpeg of 300,000 comments": lambda: (
        (data := saved(Image.new("L", (8, 8)), "JPEG"))[:2] + b"\xff\xfe\0\x02" * 300_000 + data[2:]
    ),
    "gif of 300,000 frames": lambda: gif(300_000),
    "gif that claims 65535 x 65535": lambda: gif(1, 65535),
    "gif at the limit": lambda: gif(1, SIDE),
    "tiff of 100,000 directories": lambda: directories(100_000),
    "tiff whose directories are a ring": lambda: directories(1000, loop=True),
    "tiff at the limit, deflate, RGBA": lambda: tiff("RGBA", SIDE),
    "tiff at the limit, lzw": lambda: tiff("RGB", SIDE, "tiff_lzw"),
    "tiff at the limit, floats": lambda: tiff("F", SIDE),
    "tiff of fax-coded noise, damaged": damaged_fax,
    "ppm of text, 150 MB": lambda: b"P3 5000 5000 255\n" + b"0 " * 75_000_000,
    "ppm at the limit, of 10 bits": lambda: b"P5 %d %d 1023\n" % (SIDE, SIDE) + bytes(2 * SIDE * SIDE),
    "bmp at the limit, run-length coded": lambda: bmp(SIDE, (b"\xff\0" * 34 + b"\0\0") * SIDE + b"\0\1"),
    "tga at the limit, run-length coded": lambda: (
        struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, SIDE, SIDE, 32, 8)
        + (b"\xff\0\0\0\0" * 67 + b"\xd3\0\0\0\0") * SIDE
    ),
    "ico around a png of 13300 x 13300": lambda: ico(png(13300, 1, 0)),
    "jpeg 2000 of 4000 x 4000, one colour": lambda: saved(Image.new("RGB", (4000, 4000)), "JPEG2000"),
    "jpeg 2000 of 3000 x 3000, noise": lambda: saved(Image.effect_noise((3000, 3000), 90).convert("RGB"), "JPEG2000"),
    "avif of 5000 x 5000, one colour": lambda: saved(Image.new("RGBA", (5000, 5000)), "AVIF", speed=10),
}


def build(name: str) -> bytes:
    return BOMBS[name]()


# ---- the watcher -----------------------------------------------------------------------------------------------------

_WATCH = """
import json, resource, sys, time
from gridprune_cli.images import load_image
from gridprune_cli.errors import BadInput
def peak():  # of this process, and of the largest that it started; Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    here, below = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if sys.platform == "linux":  # where the former counts what was there before this program, too
        here = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    return here * unit, below * unit
before, start = peak(), time.monotonic()
try:
    picture = load_image(sys.argv[1])
    outcome = "read: %d x %d" % picture.image.size + "".join("; " + note for note in picture.notes)
except BadInput as fault:
    outcome = str(fault).partition(sys.argv[1] + ": ")[2]
seconds = time.monotonic() - start
print(json.dumps([seconds, sum(peak()) - sum(before), outcome]))
"""


def watch(path: Path) -> tuple[float, float, str]:
    """Seconds, megabytes (of the process and, as if at the same time, of its worker) and outcome of reading a file."""
    command = [sys.executable, "-c", _WATCH, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or done.stderr:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        return 0.0, 0.0, f"FAILED with {done.returncode}: {last}"
    seconds, size, outcome = json.loads(done.stdout)
    return seconds, size / 1e6, outcome


def main(names: list[str]) -> int:
    """Runs bombs, all of them by default, and prints the table."""
    failed = 0
    print("| bomb | file, KB | s | MB | outcome |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bomb")
        for name in names or [*BOMBS, "sparse file of 300 GB", "pipe without a writer"]:
            if name == "pipe without a writer":
                os.mkfifo(path)
            elif name == "sparse file of 300 GB":
                with open(path, "wb") as file:
                    file.truncate(300 << 30)
            else:
                with ProcessPoolExecutor(1, get_context("spawn")) as maker:  # so that this process stays small
                    path.write_bytes(maker.submit(build, name).result())
            size = path.stat().st_size
            seconds, megabytes, outcome = watch(path)
            path.unlink()
            bad = outcome.startswith("FAILED") or seconds > SECONDS or megabytes > MEGABYTES
            failed += bad
            print(f"| {name} | {size / 1000:,.1f} | {seconds:.1f} | {megabytes:,.0f} | {outcome} |", end="")
            print(" TOO MUCH" if bad else "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
