"""What is asked in an evaluation: held-out scenes of the embedded model, or a JSONL file of anyone's questions."""

import io
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gridprune_cli.errors import BadInput
from gridprune_cli.files import digest
from gridprune_cli.images import Source
from gridprune_cli.scenes.scene import HELDOUT, SIZE, draw, make_scene, questions

PER_SCENE = 4  # questions
SCENES = 2000  # questions, where none are counted


@dataclass(frozen=True)
class Item:
    """A question about an image, with its true answers. `box` is what it is about, in fractions of the picture."""

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    category: str = ""
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Data:
    """The questions, and how an image is found by its name."""

    name: str
    items: tuple[Item, ...]
    find: Callable[[str], Source]

    @property
    def digest(self) -> str:
        """sha256 of everything but the images' pixels."""
        return digest([asdict(item) for item in self.items])


def open_data(name: str) -> Data:
    """`scenes`, `scenes:N` or a JSONL file. Raises BadInput, naming file and line, for what can't be used."""
    counted = re.fullmatch(r"scenes(?::(.*))?", name)
    if counted is None:
        return read_jsonl(Path(name))
    count = str(SCENES) if counted[1] is None else counted[1]
    if not re.fullmatch("0*[1-9][0-9]*", count):
        raise BadInput(f"{name}: scenes:N takes a number of questions, 1 or more")
    return scenes(int(count), HELDOUT, name)


def scenes(count: int, first: int, name: str) -> Data:
    """Questions about consecutive scenes from a seed on, `PER_SCENE` each; the kinds are the categories."""
    items: list[Item] = []
    for seed in range(first, first + -(-count // PER_SCENE)):
        scene = make_scene(seed)
        for n, asked in enumerate(questions(scene, PER_SCENE, random.Random(f"questions-{seed}"))):
            box = None
            if len(asked.asked) == 1:
                x0, y0, x1, y1 = scene.objects[asked.asked[0]].box
                box = (x0 / SIZE, y0 / SIZE, x1 / SIZE, y1 / SIZE)
            items.append(Item(f"{seed}-{n}", f"scene {seed}", asked.text, (asked.answer,), asked.kind, box))
    return Data(name, tuple(items[:count]), _draw)


@lru_cache(maxsize=256)  # a batch's pictures are asked for again under every cell; some 100 KB each
def _draw(image: str) -> bytes:
    png = io.BytesIO()
    draw(make_scene(int(image.removeprefix("scene "))))[0].save(png, "PNG", compress_level=1)
    return png.getvalue()


def read_jsonl(path: Path) -> Data:
    """A file with a question a line: `id`, `image` (relative to the file), `question`, `answers`, and `category`."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "no UTF-8"
        raise BadInput(f"{path}: can't be read ({reason}); name a JSONL file, or scenes") from fault
    items: list[Item] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(_item(line, path.parent))
            except ValueError as fault:
                raise BadInput(f"{path}:{number}: {fault}") from fault
    if not items:
        raise BadInput(f"{path}: no question in it; write one a line, as JSON")
    if double := _double([item.id for item in items]):
        raise BadInput(f"{path}: two questions have the id {double!r}; give each its own")
    return Data(str(path), tuple(items), lambda image: path.parent / image)


def _item(line: str, folder: Path) -> Item:
    """Raises ValueError for a line that is no question."""
    try:
        found: Any = json.loads(line)
    except ValueError as fault:
        raise ValueError(f"no JSON ({fault})") from fault
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    if isinstance(found.get("id"), int):
        found["id"] = str(found["id"])
    found.setdefault("category", "")
    for name in ("id", "image", "question", "category"):
        if not isinstance(found.get(name), str) or not (found[name].strip() or name == "category"):
            raise ValueError(f"{name!r} must be text")
    answers = found.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("'answers' must be a list of texts, one at least")
    if not os.path.isfile(folder / found["image"]):
        raise ValueError(f"no image {folder / found['image']}; paths count from the JSONL file's folder")
    return Item(found["id"], found["image"], found["question"], tuple(answers), found["category"])


def _double(ids: list[str]) -> str | None:
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None
