"""The questions of an evaluation: about held-out scenes of the embedded model, or from a JSONL file."""

import io
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from gridprune_cli.cache.files import digest
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Source
from gridprune_cli.questions import Item as Line
from gridprune_cli.questions import Reader
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, SIZE, draw, make_scene

T = TypeVar("T")

PER_SCENE = 4  # questions
SCENES = 2000  # questions, where none are counted
MAX_SCENES = 100_000  # questions; all are written before the first is asked, some 20,000 a second


@dataclass(frozen=True)
class Item:
    """A question about images, with its true answers.

    id   a text or a number, as the line has it; else 16 hex digits of the sha256 of the line's content
    box  the object that it is about, where it is one: left, top, right, bottom in fractions of the picture
    """

    id: Any
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    category: str = ""
    box: tuple[float, float, float, float] | None = None

    @property
    def image(self) -> str | list[str]:
        """Its images, as lines of JSON name them."""
        return one_or_all(self.images)


def one_or_all(values: Sequence[T]) -> T | list[T]:
    """How JSON holds one value per image of a question: the value for one image, a list for several."""
    return values[0] if len(values) == 1 else list(values)


@dataclass(frozen=True)
class Data:
    """The questions, and `find`, which gives an image by its name."""

    name: str
    items: tuple[Item, ...]
    find: Callable[[str], Source]

    @property
    def digest(self) -> str:
        """sha256 of everything but the images' pixels."""
        named = [asdict(item) | {"image": item.image} for item in self.items]
        return digest([{name: value for name, value in item.items() if name != "images"} for item in named])


def open_data(name: str) -> Data:
    """`scenes`, `scenes:N`, a JSONL file or `-`. Raises BadInput, naming file and line, for what can't be used."""
    counted = re.fullmatch(r"scenes(?::(.*))?", name)
    if counted is None:
        return read_jsonl(name)
    count = str(SCENES) if counted[1] is None else counted[1]
    if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= MAX_SCENES:
        raise BadInput(f"scenes:N takes a number of questions, 1 to {MAX_SCENES}", place=name[:40])
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
            items.append(Item(f"{seed}-{n}", (f"scene {seed}",), asked.text, (asked.answer,), asked.kind, box))
    return Data(name, tuple(items[:count]), _draw)


@lru_cache(maxsize=256)  # a batch's pictures are asked for again under every cell; some 100 KB each
def _draw(image: str) -> bytes:
    png = io.BytesIO()
    draw(make_scene(int(image.removeprefix("scene "))))[0].save(png, "PNG", compress_level=1)
    return png.getvalue()


def read_jsonl(path: str | Path, *, scored: bool = True) -> Data:
    """Lines of questions as `batch` takes them, with `answers`, where they are scored, and perhaps `category`.

    `-` is stdin. Raises BadInput, with file and line, for the first that can't be used.
    """
    reader = Reader(str(path))
    items = tuple(_item(line, reader, scored) for line in reader)
    if not items:
        raise BadInput("no question in it; write one a line, as JSON", place=reader.name)
    seen: set[Any] = set()
    for item in items:
        if item.id in seen:
            raise BadInput(f"two questions have the id {item.id!r}; give each another", place=reader.name)
        seen.add(item.id)
    return Data(reader.name, items, lambda image: Path(reader.place(image)))


def _item(line: Line, reader: Reader, scored: bool) -> Item:
    """Raises BadInput for a line that can't be asked, or can't be scored though it is to be."""
    if line.fault is not None:
        raise BadInput(line.fault)
    answers, category = line.extra.get("answers"), line.extra.get("category", "")
    if line.keep is not None:
        raise BadInput("here all lines are asked at the shares of `keep`; leave keep out of the line", place=line.place)
    if not scored:
        answers, category = [], ""
    elif not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadInput('answers is no list of texts; give the true ones, as "answers": ["stop"]', place=line.place)
    if not isinstance(category, str):
        raise BadInput("category is no text; change it, or leave it out", place=line.place)
    for image in line.images:
        if not os.path.isfile(reader.place(image)):
            reason = f"no image {reader.place(image)}; relative paths count from {reader.folder}"
            raise BadInput(reason, place=line.place)
    return Item(line.id, line.images, line.question, tuple(answers), category)
