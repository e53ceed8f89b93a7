"""What is tried: for each kind of input, what makes a case of it, and what must hold of what comes out."""

import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from . import files

WORDS = ("a", "ß", "\x1b[31m", "‮", "\u2028", "日本", "$x^2$", "|", "`", "", " ", "\x00", "\ud800", "e\u0301")
DEPTH = (1, 5, 60, 400, 982, 1500, 20_000)
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


@dataclass(frozen=True)
class Target:
    """`run` tries one case, and gives what came of it in a word; `share` of the cases are its own, about."""

    run: Callable[[Random], str]
    share: float
    prepare: Callable[[], Any] = field(default=lambda: None)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def mutate(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """Some bytes changed, moved, doubled, cut off, or taken from another file."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8, 30))):
        if not out:
            break
        at, kind = random.randrange(len(out)), random.randrange(7)
        length = random.choice((1, 2, 4, 16, 64, 1024))
        if kind == 0:
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            width = random.choice((1, 2, 4))
            value = (random.choice(EXTREMES) & ((1 << 8 * width) - 1)).to_bytes(width, random.choice(("big", "little")))
            out[at : at + width] = value
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * random.choice((1, 2, 50))
        elif kind == 4:
            out[at:at] = random.randbytes(length)
        elif kind == 5:
            del out[at:]
        else:
            start = random.randrange(len(other)) if other else 0
            out[at : at + length] = other[start : start + length]
    return bytes(out)


# ---- images ----------------------------------------------------------------------------------------------------------


@cache
def pictures() -> list[bytes]:
    """Small image files of every format and mode that is read."""
    from PIL import Image, features

    noise = Image.effect_noise((23, 17), 90)
    rgb = Image.merge("RGB", (noise, noise.rotate(90, expand=False), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = rgb.copy()
    rgba.putalpha(noise)
    forms: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (noise, "JPEG", {"comment": b"text" * 9}),
        (rgb, "PNG", {"exif": exif}),
        (rgba, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (noise.convert("I;16"), "PNG", {}),
        (noise.convert("1"), "PNG", {}),
        (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgba, "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"exif": exif}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb.quantize(16), "GIF", {"save_all": True, "append_images": [rgb.rotate(180).quantize(16)]}),
        (rgb, "BMP", {}),
        (noise, "BMP", {}),
        (rgb, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw", "save_all": True, "append_images": [rgb]}),
        (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (noise.convert("1"), "TIFF", {"compression": "group4"}),
        (noise.convert("F"), "TIFF", {}),
        (rgb, "PPM", {}),
        (rgb, "ICO", {"sizes": [(16, 16)]}),
        (rgba, "TGA", {}),
    ]
    forms += [(rgb, "AVIF", {})] if features.check("avif") else []
    forms += [(rgb, "JPEG2000", {})] if features.check("jpg_2000") else []
    files = [b"P3 3 2 255\n" + b"1 2 3 " * 6]
    for image, form, settings in forms:
        out = io.BytesIO()
        image.save(out, form, **settings)
        files.append(out.getvalue())
    return files


def run_image(random: Random) -> str:
    from gridprune_cli.errors import BadInput
    from gridprune_cli.images import load_image, measure

    # compressed TIFF goes to a process of its own, which takes as long as hundreds of other cases
    weights = [0.05 if image.startswith(b"II*") else 1 for image in pictures()]
    image, other = random.choices(pictures(), weights, k=2)
    data = mutate(random, image, other)
    try:
        width, height = measure(data)
    except BadInput:
        width = height = 0
    picture = load_image(data)
    assert picture.image.mode == "RGB" and min(picture.image.size) > 0
    picture.image.tobytes()
    assert not width or sorted(picture.image.size) == sorted((width, height)), (picture.image.size, width, height)
    return "read"


# ---- lines of questions ----------------------------------------------------------------------------------------------


def word(random: Random) -> str:
    return "".join(random.choices(WORDS, k=random.choice((0, 1, 3, 40))))


def value(random: Random, depth: int = 0) -> Any:
    """Any JSON value, with numbers and texts that are hard to handle."""
    kind = random.randrange(9 if depth < 4 else 7)
    if kind == 0:
        return random.choice((0, -1, 1.5, 1e308, -0.0, 5e-324, 2**63, 2**70, 0.11, 1))
    if kind == 1:
        return random.choice((True, False, None))
    if kind < 7:
        return word(random)
    if kind == 7:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    return {word(random): value(random, depth + 1) for _ in range(random.randrange(4))}


def line(random: Random) -> bytes:
    """A line as `batch` and `eval` take it, more or less."""
    record = {"image": "a.png", "question": "What?"}
    fields = ("id", "image", "question", "keep", "answer", "answers", "options", "category", "tokens", word(random))
    for name in random.sample(fields, random.randrange(5)):
        record[name] = value(random)
    for name in ("image", "question"):
        if random.random() < 0.1:
            del record[name]
    written = json.dumps(record, ensure_ascii=random.random() < 0.5)
    kind = random.randrange(8)
    if kind == 0:
        depth = random.choice(DEPTH)
        opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
        written = f'{{"image":"a.png","question":"q","x":{opening * depth}1{closing * depth}}}'
    elif kind == 1:
        written = written.replace("1", random.choice(("NaN", "Infinity", "1e999", "9" * 5000, "-")))
    elif kind == 2:
        written = random.choice(("[]", "1", '"text"', "null", "", "{", "\ufeff{}", written * 2))
    data = written.encode("utf-8", "surrogatepass")
    return mutate(random, data) if random.random() < 0.3 else data


def run_line(random: Random) -> str:
    from gridprune_cli.cache.files import canonical
    from gridprune_cli.questions import parse

    item = parse(line(random), "file:1")
    if item.fault is not None:
        assert len(item.fault.splitlines()) == 1, item.fault
    echo = json.dumps(item.echo() | item.extra)
    assert canonical(json.loads(echo)) == canonical(item.echo() | item.extra)
    return "read" if item.fault is None else "refused"


# ---- pruned sets and cache entries -----------------------------------------------------------------------------------


@cache
def embedded() -> tuple[Any, Any, bytes, bytes]:
    """The embedded model with a cache, an encoded scene, and the bytes of its entry and of a pruned set."""
    from gridprune_cli.cache.store import Store
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.scenes.scene import draw, make_scene
    from gridprune_cli.settings import Pruning

    png = io.BytesIO()
    draw(make_scene(0))[0].save(png, "PNG")
    pipeline = Pipeline("scenes", device="cpu", dtype="float32", store=Store(folder() / "cache", None))
    encoded, _ = pipeline.encode(png.getvalue())
    pruned = pipeline.prune(encoded, "Where is the star?", Pruning(ilp=0.05))
    return pipeline, encoded, encoded.to_bytes(), pruned.to_bytes()


def run_pruned(random: Random) -> str:
    from gridprune_cli.generation import check_model
    from gridprune_cli.tokens import PrunedSet

    pipeline, _, _, whole = embedded()
    if random.random() < 0.5:
        PrunedSet.from_bytes(files.raw(random, whole), "x")
        raise AssertionError("changed bytes were read")
    pruned = PrunedSet.from_bytes(files.semantic(random, whole), "x")
    check_model(pipeline.family, pruned)
    json.dumps(pruned.to_json())
    if random.random() < 0.05:
        pipeline.generate(pruned, max_new_tokens=2)
    return "read"


def run_entry(random: Random) -> str:
    import torch

    from gridprune_cli.cache.layout import entry_path

    pipeline, encoded, whole, _ = embedded()
    path = entry_path(pipeline.store.root, encoded.encoder, encoded.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = files.raw if random.random() < 0.5 else files.semantic
    path.write_bytes(changed(random, whole))
    hit = pipeline.encoder.look_up(encoded.image, "x")
    if hit is None:
        return "missed"
    assert changed is files.semantic, "changed bytes were read"
    assert hit.vision_features.shape == encoded.vision_features.shape and bool(
        torch.isfinite(hit.vision_features).all()
    )
    json.dumps(pipeline.prune(hit, "Where is the star?").to_json())
    return "read"


# ---- text that a terminal reads --------------------------------------------------------------------------------------


def run_text(random: Random) -> str:
    from gridprune_cli.text import markdown_cell, printable, to_json, visible

    characters = (random.randrange(0x20), random.randrange(0x80, 0xA0), 0x202E, 0x2066, 0x1B, 0x41, 0xD800, 0x2028)
    written = word(random) + "".join(chr(random.choice(characters)) for _ in range(random.randrange(30)))
    shown = printable(written)
    assert shown.isprintable() and len(shown.splitlines()) <= 1, shown
    shown.encode()
    assert all(c in "\n\t" or c.isprintable() or c.isspace() for c in visible(written)), written
    assert markdown_cell(written).isprintable()
    assert json.loads(to_json(written)) == written
    return "shown"


# ---- signals ---------------------------------------------------------------------------------------------------------


def run_signals(random: Random) -> str:
    import torch

    from gridprune_cli.pruning.methods import METHODS, make_method
    from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Signals, View

    views = tuple(
        View(random.choice((1, 1, 2, 3, 7, 16)), random.choice((1, 2, 3, 5, 16)), (0.0, 0.0, 1.0, 1.0))
        for _ in range(random.choice((1, 1, 1, 2, 4)))
    )
    count = sum(view.count for view in views)
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))

    def numbers(*shape: int, low: float = -1.0) -> torch.Tensor:
        drawn = torch.rand(shape, generator=generator) * (1 - low) + low
        kind = random.randrange(7)
        if kind == 0:
            drawn[:] = drawn.flatten()[0]
        elif kind == 1:
            drawn *= random.choice((0.0, 1e-38, 1e-45, 1e4, 1e15))
        elif kind == 2:
            drawn = (drawn * 3).round() / 3
        elif kind == 3:
            drawn[torch.rand(shape, generator=generator) < 0.7] = 0.0
        return drawn.to(random.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16)))

    corners = [sorted((random.randrange(8), random.randrange(8))) for _ in range(2)]
    (x0, x1), (y0, y1) = corners
    signals = Signals(
        views,
        relevance=numbers(count).clamp(-1, 1),
        saliency=numbers(count, low=0.0),
        region=random.choice((None, (x0, y0, x1, y1))),
        vision_features=numbers(count, 6),
        image_embeds=numbers(count, 4),
        question_embeds=numbers(random.choice((1, 3)), 4),
        **{name: numbers(count, low=0.0) for name in OPTIONAL_SIGNALS},
        importance=numbers(count),
        patch_lengths=numbers(count, low=0.0),
        relevance_sign=random.choice((1, -1)),
    )
    k = random.randint(1, count)
    name = random.choice(list(METHODS))
    try:
        method = make_method(name)
        kept = method.select_batch([signals], [k])[0]
    except ValueError as fault:
        assert str(fault), name
        return "refused"
    expected = count if "stages" in vars(type(method)) else k
    assert kept.dtype == torch.int64 and len(kept) == expected, (name, k, len(kept))
    assert torch.equal(kept, kept.unique()) and int(kept[0]) >= 0 and int(kept[-1]) < count, (name, kept)
    assert torch.equal(kept, make_method(name).select_batch([signals], [k])[0]), name
    weights = method.merge(signals, kept)
    assert weights is None or bool(torch.isfinite(weights.to_dense()).all()), name
    return "chosen"


# ---- the command line ------------------------------------------------------------------------------------------------

RUBBISH = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "0.5", "1.0", "nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000),
    *("2147483648", "99999999999999999999", "0/1", "3/2", "a/b", "0,0,7,7", "7,7,0,0", "1,2", "auto", "none", "off"),
    *("\udcff", "\x1b[31m", "é" * 300, "x" * 5000, "../../x", "/dev/null", "/nonexistent/x", ".", "a=b", "=", "a=[["),
    *("num_beams=2147483648", "top_k=-1", "do_sample=true", "temperature=0", "12h", "500M", "{question}", "{image}"),
)
COMMANDS = (
    ("ask", ("{image}", "What?")),
    ("prune", ("{image}", "What?", "-o", "{folder}/x.safetensors")),
    ("show", ("{image}", "What?")),
    ("batch", ("{lines}",)),
    ("encode", ("{image}",)),
    ("generate", ("{folder}/x.safetensors",)),
    ("export", ("{folder}/x.safetensors", "--to", "vllm", "-o", "{folder}")),
    ("eval", ("{lines}", "-o", "{folder}/run")),
    ("cache", ("ls",)),
    ("cache", ("gc",)),
    ("cache", ("info",)),
    ("models", ()),
    ("env", ()),
)


@cache
def flags() -> dict[str, list[str]]:
    """The options of every command, by its name as it is typed."""
    from typer.main import get_command

    from gridprune_cli.cli.app import app

    def walk(command: Any, names: tuple[str, ...]) -> dict[str, list[str]]:
        some = {" ".join(names): [flag for parameter in command.params for flag in parameter.opts if flag[0] == "-"]}
        for name, below in getattr(command, "commands", {}).items():
            some |= walk(below, (*names, name))
        return some

    return walk(get_command(app), ())


@cache
def folder() -> Path:
    """A folder of this process with an image that is none and lines that name it, for commands that end early."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (path / "lines.jsonl").write_text('{"image": "broken.png", "question": "What?", "answer": "a"}\n')
    os.environ |= {"GRIDPRUNE_CACHE_DIR": str(path / "cache"), "XDG_CONFIG_HOME": str(path / "config")}
    os.environ |= {"HF_HOME": str(path / "hub")}
    return path


def run_options(random: Random) -> str:
    import gridprune_cli.cli.app as cli

    places = {"image": str(folder() / "broken.png"), "lines": str(folder() / "lines.jsonl"), "folder": str(folder())}
    command, arguments = random.choice(COMMANDS)
    argv = [argument.format(**places) for argument in arguments]
    name = f"{command} {argv[0]}" if command == "cache" else command
    harmless = [flag for flag in flags()[name] if flag not in ("--device", "--engine", "--address", "--workers")]
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        argv += random.choice(([random.choice(harmless), random.choice(RUBBISH)], [random.choice(harmless)]))
    if argv and random.random() < 0.2:
        argv[random.randrange(len(argv))] = random.choice(RUBBISH)
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, os.getcwd()
    sys.argv, sys.stdin = ["gridprune", command, *argv], io.TextIOWrapper(io.BytesIO(b""))
    os.chdir(folder())
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin, _ = before
        os.chdir(before[2])
    written = err.getvalue()
    assert code in (0, 1, 2, 3), (sys.argv, code)
    assert not re.search(r"unexpected \w+:|Traceback", written), (argv, written)
    assert code in (0, 3) or len(written.splitlines()) >= 1, argv
    assert "\x1b" not in written and "\x1b" not in out.getvalue(), argv
    return f"exit {code}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@cache
def checkpoint() -> Path:
    """A copy of the embedded model's folder in which one file at a time is broken."""
    from gridprune_cli.scenes import CHECKPOINT

    path = folder() / "checkpoint"
    shutil.copytree(CHECKPOINT, path, ignore=shutil.ignore_patterns("clip"))
    return path


def run_checkpoint(random: Random) -> str:
    from gridprune_cli.pipeline import Pipeline

    name = random.choice(sorted(path.name for path in checkpoint().glob("*.json")))
    path = checkpoint() / name
    before = path.read_bytes()
    broken = json.loads(before)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node if isinstance(node, dict) else range(min(len(node), 40))):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(broken)
    for _ in range(random.choice((1, 1, 2, 5))):
        node, key = random.choice(places)
        if isinstance(node, dict) and random.random() < 0.3:
            node.pop(key, None)
        else:
            node[key] = value(random)
    kind = random.randrange(6)
    data = json.dumps(broken).encode("utf-8", "surrogatepass")
    if kind == 0:
        data = mutate(random, before)
    elif kind == 1:
        data = random.choice((b"", b"[]", b'"text"', b"[" * 2000, b"null", b"\xff\xfe", b"{}"))
    try:
        path.write_bytes(data)
        family = Pipeline(str(checkpoint()), clip=None, device="cpu", dtype="float32").family
        _ = family.processor, family.encoder, family.fingerprint
        return "opened"
    finally:
        path.write_bytes(before)


TARGETS = {
    "images": Target(run_image, 30, pictures),
    "lines": Target(run_line, 40),
    "pruned": Target(run_pruned, 8, embedded),
    "entries": Target(run_entry, 4, embedded),
    "text": Target(run_text, 14),
    "signals": Target(run_signals, 3, flags),
    "options": Target(run_options, 0.8, flags),
    "checkpoints": Target(run_checkpoint, 0.2, checkpoint),
}
