import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fuzz import bombs
from PIL import Image, ImageFile

from gridprune_cli import decoding, image_files
from gridprune_cli.errors import BadInput
from gridprune_cli.image_files import read_image, read_source
from gridprune_cli.images import find_images, identify, load_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def write(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = load_image(data).image
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_equal_bytes_are_one_image_whatever_their_name(tmp_path: Path) -> None:
    data = write(Image.fromarray(RGB))
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(data)
    first, second = load_image(tmp_path / "a.png"), load_image(str(tmp_path / "b.jpg"))
    assert first.sha256 == second.sha256 == hashlib.sha256(data).hexdigest()
    assert (first.name, second.name) == (str(tmp_path / "a.png"), str(tmp_path / "b.jpg"))
    assert identify(tmp_path / "a.png") == (first.sha256, first.name, data)


def test_a_file_that_was_overwritten_is_another_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(write(Image.new("RGB", (4, 4), "blue")))
    before = identify(path)[0]
    path.write_bytes(write(Image.new("RGB", (4, 4), "red")))
    assert identify(path)[0] != before
    assert load_image(path).image.getpixel((0, 0)) == (255, 0, 0)


def test_equal_pixels_in_another_shape_are_another_image() -> None:
    flat = bytes(range(72))
    wide, tall = (write(Image.frombytes("RGB", size, flat)) for size in ((6, 4), (4, 6)))
    assert load_image(wide).image.tobytes() == load_image(tall).image.tobytes()
    assert identify(wide)[0] != identify(tall)[0]


def test_nothing_is_decoded_to_identify() -> None:
    assert identify(b"not an image") == (hashlib.sha256(b"not an image").hexdigest(), "-", b"not an image")


def test_stdin_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(Image.fromarray(RGB))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    source = read_source("-")
    assert source == data
    assert load_image(source, "x").name == "x"
    assert load_image(source).name == "-"
    with pytest.raises(BadInput, match=r"-: empty"):
        read_source("-")
    assert read_source("a.png") == "a.png"


def test_nobody_is_left_waiting_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"x"))
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(BadInput, match="terminal"):
        read_image("-")


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(write(Image.fromarray(RGB), kind, **options)), RGB)


def test_jpeg_webp_and_avif_come_close() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    smooth = np.stack([ramp, ramp.T, ramp // 2], -1)
    for kind in ("JPEG", "WEBP", "AVIF"):
        got = pixels(write(Image.fromarray(smooth), kind, quality=95))
        assert np.abs(got.astype(int) - smooth).mean() < 4


def test_each_orientation_is_turned_upright() -> None:
    height, width = 4, 6
    upright = np.arange(height * width, dtype=np.uint8).reshape(height, width) * 10
    for orientation in range(1, 9):
        # EXIF says where row 0 and column 0 of the stored picture lie in the upright one
        stored = upright
        if orientation in (5, 6, 7, 8):
            stored = stored.T
        row0_last, column0_last = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
        if orientation in (5, 6, 7, 8):  # 5: row 0 left, column 0 top; 6: right, top; 7: right, bottom; 8: left, bottom
            row0_last, column0_last = orientation in (6, 7), orientation in (7, 8)
        stored = stored[:: -1 if row0_last else 1, :: -1 if column0_last else 1]
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = write(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), kind, exif=exif, **options)
            assert np.array_equal(pixels(data)[..., 0], upright), (orientation, kind)


def test_broken_exif_is_no_reason_to_refuse_whole_pixels() -> None:
    data = write(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels(data), RGB)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(write(Image.fromarray(rgba))) - expected).max() <= 1
    grey = np.array([[[0, 0], [0, 255], [100, 51]]], np.uint8)
    assert pixels(write(Image.fromarray(grey, "LA")))[0, :, 0].tolist() == [255, 0, 224]


def test_a_transparent_palette_entry_and_a_transparent_colour_are_white() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(write(palette)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert pixels(write(palette, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(write(colours, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_grey_and_one_bit() -> None:
    assert pixels(write(Image.fromarray(RGB[..., 0]))).tolist() == RGB[..., [0, 0, 0]].tolist()
    assert pixels(write(Image.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    grey = np.array([[0, 128, 129, 255, 256, 257, 30_000, 65_278, 65_406, 65_407, 65_535]], np.uint16)
    expected = np.floor(grey / 257 + 0.5).astype(int)
    assert pixels(write(Image.fromarray(grey), kind))[..., 1].tolist() == expected.tolist()


def test_big_endian_sixteen_bits() -> None:
    grey = np.array([[1, 256, 65_535]], ">u2")
    image = Image.frombytes("I;16B", (3, 1), grey.tobytes())
    assert pixels(write(image, "TIFF"))[..., 0].tolist() == [[0, 1, 255]]


def test_floats_within_one_are_scaled_and_others_refused() -> None:
    data = write(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF")
    assert pixels(data)[..., 0].tolist() == [[0, 128, 255]]
    for values in ([[0, 1.5]], [[-0.1, 1]], [[np.nan, 1]]):
        with pytest.raises(BadInput, match="not within 0 to 1"):
            load_image(write(Image.fromarray(np.array(values, np.float32)), "TIFF"))
    with pytest.raises(BadInput, match="70000"):
        load_image(write(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"))


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    grey = Image.fromarray(np.array([[0, 1, 256, 65_535]], np.uint16))
    assert pixels(write(grey, transparency=256))[0, :, 0].tolist() == [0, 0, 255, 255]
    assert pixels(write(grey, transparency=0))[0, :, 0].tolist() == [255, 0, 1, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "F", "1", "CMYK"])
def test_a_picture_converted_in_bands_is_the_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(5)
    if mode == "F":
        image = Image.fromarray(noise.random((37, 11), dtype=np.float32))
    elif mode.startswith("I"):
        image = Image.frombytes(mode, (11, 37), noise.bytes(2 * 11 * 37))
    else:
        image = Image.fromarray(noise.integers(0, 256, (37, 11, 4), dtype=np.uint8)).convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    data = write(image, "TIFF" if mode in ("F", "I;16B", "CMYK") else "PNG", **options)
    whole = pixels(data)
    monkeypatch.setattr(decoding, "_BAND", 50)
    assert np.array_equal(pixels(data), whole)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str) -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(pixels(write(image, kind)).astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_noted(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = load_image(write(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert picture.image.getpixel((3, 3)) == (255, 0, 0)
    assert picture.notes == (
        "several pages: the first is taken" if kind == "TIFF" else "animated: the first frame is taken",
    )


def test_a_camera_jpeg_with_a_preview_is_one_picture() -> None:
    frames = [Image.new("RGB", size, "red") for size in ((16, 16), (8, 8))]
    picture = load_image(write(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert (picture.image.size, picture.notes) == ((16, 16), ())


# ---- files that are refused ------------------------------------------------------------------------------------------


def refused(source: Path | bytes, name: str | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        load_image(source, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_image_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    os.mkdir(tmp_path / "folder")
    for name, reason in {
        "missing.png": "no such file; check the path",
        "empty.png": "empty, 0 bytes",
        "folder": "a folder",
        "text.jpg": "not an image",
        "empty.png/x.png": "can't be read",
        "n\0l.png": "can't be read",
        "x" * 300: "can't be read",
    }.items():
        message = refused(tmp_path / name)
        assert reason in message
        assert name in message or name == "n\0l.png"
    assert r"two\nlines.png" in refused(tmp_path / "two\nlines.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_file_that_was_cut_short_is_refused(kind: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as other libraries set it
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = write(Image.fromarray(noise), kind)
    for share in (0.02, 0.5, 0.8):
        assert "x.img" in refused(data[: int(len(data) * share)], "x.img")
    assert load_image(data).image.size == (64, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_damage_inside_is_refused_or_decoded_but_never_a_crash() -> None:
    noise = np.random.default_rng(3)
    for kind in ("PNG", "GIF", "TIFF", "WEBP", "BMP"):
        data = write(Image.fromarray(RGB), kind)
        for _ in range(60):
            broken = bytearray(data)
            for place in noise.integers(0, len(data), 3):
                broken[place] = noise.integers(256)
            try:
                assert load_image(bytes(broken)).image.mode == "RGB"
            except BadInput as fault:
                assert "\n" not in str(fault)


def test_postscript_is_not_run() -> None:
    assert "not an image" in refused(write(Image.fromarray(RGB), "EPS"))


def _claims(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header claims another size."""
    import zlib

    data = bytearray(write(Image.new("RGB", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_decompression_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # other libraries lift Pillow's limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for width, height in ((20_000, 20_000), (2**31 - 1, 2**31 - 1)):
            assert "million" in refused(_claims(width, height))
    monkeypatch.setattr(image_files, "MAX_PIXELS", 60)
    assert pixels(write(Image.fromarray(RGB))).shape == (6, 10, 3)
    assert "10 x 7 pixels" in refused(write(Image.new("RGB", (10, 7))))


def test_shapes_at_the_edge() -> None:
    assert load_image(write(Image.new("RGB", (1, 1)))).image.size == (1, 1)
    assert load_image(write(Image.new("RGB", (200, 1)))).image.size == (200, 1)
    for size in ((201, 1), (1, 201), (4010, 20)):
        assert "200 : 1" in refused(write(Image.new("RGB", size)))


def test_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_BYTES", 1 << 20)
    (tmp_path / "x").write_bytes(bytes((1 << 20) + 1))
    assert "more than 1 MiB" in refused(tmp_path / "x")
    assert "more than 1 MiB" in refused(Path("/dev/zero"))


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {}), ("AVIF", {})])
def test_a_decoder_of_its_own_process_gives_the_same(kind: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = write(Image.fromarray(RGB), kind, exif=exif, **options)
    here = decoding._decode(data, decoding.Clock(), lambda image: False)
    monkeypatch.setattr(decoding, "_ONE_CALL", dict.fromkeys(decoding._ONE_CALL, 1))
    monkeypatch.setattr(decoding, "_decode_apart", (spy := Spy(decoding._decode_apart)))
    there = load_image(data)
    assert spy.calls == 1 and np.array_equal(there.image, here[0]) and there.notes == here[1]
    refused(data[: len(data) * 2 // 3])


class Spy:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_what_a_decoder_complains_of_is_damage_and_stays_off_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert "damaged (Fax4Decode:" in refused(bombs.damaged_fax())
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not bound an address space")
def test_a_process_that_decodes_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding._ONE_CALL, "WEBP", 1)
    data = bombs.webp(3000, 3000)
    assert load_image(data).image.size == (3000, 3000)
    monkeypatch.setattr(decoding, "MAX_MEMORY", 200_000_000)
    assert "memory" in refused(data)


@pytest.mark.parametrize("apart", [False, True])
def test_decoding_ends_when_its_time_is_up_or_it_is_stopped(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bombs.webp(4000, 4000) if apart else bombs.png(3000, 8, 6)
    monkeypatch.setitem(decoding._ONE_CALL, "WEBP", 1)
    with ThreadPoolExecutor(1, initializer=image_files.stop_when, initargs=(lambda: True,)) as threads:
        assert "interrupted" in threads.submit(refused, data).result()
    monkeypatch.setattr(image_files, "MAX_SECONDS", 0.05)
    assert "takes more than 0.05 s" in refused(data)


@pytest.mark.parametrize(
    ("name", "outcome"),
    {
        "webp 13300 x 13300, lossless": "75 million",
        "png at the limit, palette, tRNS": "read: 8660 x 8660",
        "png of a text of 100 MB": "damaged",
        "jpeg 3000 x 3000, 2,000 scans": "more than 100 scans",
        "gif of 300,000 frames": "read: 1 x 1; animated: the first frame is taken",
        "tiff of 100,000 directories": "read: 1 x 1; several pages: the first is taken",
        "tiff whose directories are a ring": "read: 1 x 1",
        "ico around a png of 13300 x 13300": "million",
    }.items(),
)
def test_bombs_are_bounded(name: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(bombs.BOMBS[name]())
    seconds, megabytes, line = bombs.watch(tmp_path / "bomb")
    assert line.startswith(outcome) or (outcome in line and not outcome.startswith("read"))
    assert seconds < 20 and megabytes < 1500


def test_the_limit_of_pixels_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 50)
    data = write(Image.fromarray(RGB))
    assert "GRIDPRUNE_MAX_PIXELS" in refused(data)
    monkeypatch.setenv("GRIDPRUNE_MAX_PIXELS", "60")
    assert load_image(data).image.size == (10, 6)
    for wrong in ("many", "-1", "9" * 5000):
        monkeypatch.setenv("GRIDPRUNE_MAX_PIXELS", wrong)
        assert "not a number of pixels" in refused(data)


def test_scans_are_counted_from_marker_to_marker() -> None:
    decoding._check_scans(bombs.scans(64, 80))
    with pytest.raises(BadInput, match="more than 100 scans"):
        decoding._check_scans(bombs.scans(64, 100))
    data = bombs.scans(64, 0)
    hidden = b"\xff\xe1" + (2 + 4000).to_bytes(2, "big") + b"\xff\xda" * 2000  # inside a segment
    decoding._check_scans(data[:2] + hidden + data[2:] + b"\xff\xda" * 200)  # and behind the end


def test_pipes_are_read_and_nobody_waits_for_ever_at_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pipe = write(Image.fromarray(RGB)), tmp_path / "pipe.png"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert read_image(pipe) == data
    writer.join()
    monkeypatch.setattr(image_files, "MAX_SECONDS", 0.2)
    assert "gives nothing for" in refused(pipe)
    reader, end = os.pipe()
    try:
        os.write(end, data)
        os.close(end)  # who wrote it is gone before it is read, as with the shell's <(...)
        assert read_image(f"/dev/fd/{reader}") == data
    finally:
        os.close(reader)


def test_a_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(300 << 30)
    assert "more than 256 MiB" in refused(tmp_path / "x.png")


def test_running_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    data = write(Image.fromarray(RGB))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert "memory" in refused(data)


def test_nothing_is_printed() -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0] * 6)
    code = "import sys; from gridprune_cli.images import *; load_image('-')"
    data = write(palette, transparency=b"\0\x80")  # makes Pillow warn
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_searched_and_files_taken_as_given(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/c.webp", "a/notes.txt", ".hidden.png", ".git/x.png", "odd.data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    below = [tmp_path / name for name in ("a/c.webp", "a/z.png", "b.JPG")]
    assert find_images([tmp_path]) == below
    named = [tmp_path / "odd.data", tmp_path / ".hidden.png", Path("missing.png")]
    assert find_images([str(named[0]), tmp_path, *named[1:]]) == [named[0], *below, *named[1:]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no image in this folder"):
        find_images([tmp_path, tmp_path / "empty"])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match=r"locked: can't be listed \(Permission denied\)"):
        find_images([tmp_path])


def test_in_folders_only_files_count(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")  # which is told when it is read
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "d.png"))
        assert find_images([tmp_path]) == [tmp_path / "a.png", tmp_path / "gone.png"]
    assert find_images([tmp_path / "b.png"]) == [tmp_path / "b.png"]
