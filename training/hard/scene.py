"""Hard scenes: 336 x 336 pictures with small objects, and signs with words.

The first scenes (`gridprune_cli.scenes.scene`) at LLaVA-1.5's own 24 x 24 grid, 6 to 16 objects of about one and a half
patches, and 1 to 3 coloured signs with words of 3 to 5 letters. A sign is no object. Everything follows from one seed;
the ranges of the seeds are those of the first scenes.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gridprune_cli.scenes.scene import (
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    background,
    distract,
    glyph,
    shape_mask,
)

SIZE = 336  # pixels, both sides
PATCH = 14
GRID = SIZE // PATCH  # 24 x 24 visual tokens
N = GRID * GRID
MIN_OBJECTS, MAX_OBJECTS = 6, 16
MAX_SIGNS = 3
CONSONANTS, VOWELS = "BDFGKLMNPRST", "AEIOU"
LETTERS = CONSONANTS + VOWELS

_GAP = 5  # pixels between objects
_OFF_LINE = 6  # pixels between a centre and the lines between the nine places


@dataclass(frozen=True)
class SmallObject(SceneObject):
    """One shape of 18 to 25 pixels, with nothing written on it."""

    character: str = ""

    @property
    def place(self) -> str:
        x, y = self.centre
        return PLACES[int(3 * y / SIZE) * 3 + int(3 * x / SIZE)]

    @property
    def centre_patch(self) -> int:
        x, y = self.centre
        return int(y // PATCH) * GRID + int(x // PATCH)


@dataclass(frozen=True)
class Sign:
    """A coloured plate with a word, a letter in each of the patches from (row, column) to the right.

    The whole of it is moved by `offset` (x, y), at most 2 pixels, against the grid of the patches.
    """

    row: int
    column: int
    offset: tuple[int, int]
    colour: str
    text: str

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its outer box in pixels, the last ones exclusive."""
        x, y = self.column * PATCH + self.offset[0], self.row * PATCH + self.offset[1]
        return x - 2, y - 1, x + PATCH * len(self.text) + 2, y + PATCH + 1

    @property
    def patches(self) -> tuple[int, ...]:
        """The patch of each letter."""
        first = self.row * GRID + self.column
        return tuple(range(first, first + len(self.text)))


@dataclass(frozen=True)
class HardScene(Scene):
    """The contents of one picture."""

    objects: tuple[SmallObject, ...]
    signs: tuple[Sign, ...] = ()


def make_scene(seed: int) -> HardScene:
    """The scene of a seed. Boxes never overlap; some colours and shapes are rare, so that they single objects out."""
    rng = random.Random(f"hard-{seed}")
    signs: list[Sign] = []
    for colour in rng.sample(list(COLOURS), rng.randint(1, MAX_SIGNS)):
        text = _word(rng)
        offset = rng.randint(-2, 2), rng.randint(-2, 2)
        sign = Sign(rng.randrange(1, GRID - 1), rng.randrange(1, GRID - len(text)), offset, colour, text)
        if not any(_near(sign.box, other.box) for other in signs):
            signs.append(sign)
    palette = rng.sample(list(COLOURS), rng.randint(3, 8))
    shapes = rng.sample(SHAPES, rng.randint(3, 6))
    objects: list[SmallObject] = []
    taken = [sign.box for sign in signs]
    count = rng.randint(MIN_OBJECTS, MAX_OBJECTS)
    while len(objects) < count:
        size = rng.randint(18, 25)
        x, y = rng.randint(1, SIZE - size - 1), rng.randint(1, SIZE - size - 1)
        box = (x, y, x + size, y + size)
        on_line = any(abs((v + size / 2) - line) < _OFF_LINE for v in (x, y) for line in (SIZE / 3, 2 * SIZE / 3))
        if on_line or any(_near(box, other) for other in taken):
            continue
        taken.append(box)
        objects.append(SmallObject(box, _skewed(rng, palette), _skewed(rng, shapes)))
    return HardScene(seed, tuple(objects), tuple(signs))


def _word(rng: random.Random) -> str:
    """3 to 5 letters, consonants and vowels in turn."""
    first = rng.random() < 0.75
    return "".join(rng.choice(CONSONANTS if (i % 2 == 0) == first else VOWELS) for i in range(rng.randint(3, 5)))


def _skewed(rng: random.Random, options: list[str]) -> str:
    return rng.choices(options, [1 / (i + 1) for i in range(len(options))])[0]


def _near(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] + _GAP and b[0] < a[2] + _GAP and a[1] < b[3] + _GAP and b[1] < a[3] + _GAP


def draw(scene: HardScene) -> Image.Image:
    rng = np.random.default_rng(scene.seed)
    picture = background(rng, SIZE)
    distract(rng, picture, biggest=3)
    for obj in scene.objects:
        picture.paste(_tint(rng, obj.colour), obj.box[:2], shape_mask(obj.shape, obj.box[2] - obj.box[0]))
    for sign in scene.signs:
        tint = _tint(rng, sign.colour)
        x0, y0, x1, y1 = sign.box
        ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill=tint)
        bright = 0.3 * tint[0] + 0.59 * tint[1] + 0.11 * tint[2] > 125
        for i, letter in enumerate(sign.text):
            ink, _ = glyph(letter, 11)
            centre = x0 + 2 + PATCH * i + PATCH // 2, y0 + 1 + PATCH // 2
            corner = centre[0] - ink.width // 2, centre[1] - ink.height // 2
            picture.paste((0, 0, 0) if bright else (255, 255, 255), corner, ink)
    noise = rng.normal(0, rng.uniform(2, 8), (SIZE, SIZE, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(picture, np.float32) + noise).clip(0, 255).astype(np.uint8))


def _tint(rng: np.random.Generator, colour: str) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255))


def pixel_owners(scene: HardScene) -> np.ndarray:
    """What each pixel shows: `(336, 336)` uint8, 0 background, i + 1 object i, and after them the signs."""
    owner = np.zeros((SIZE, SIZE), np.uint8)
    for i, obj in enumerate(scene.objects):
        x0, y0, x1, y1 = obj.box
        owner[y0:y1, x0:x1][np.asarray(shape_mask(obj.shape, x1 - x0)) > 127] = i + 1
    for i, sign in enumerate(scene.signs, len(scene.objects)):
        x0, y0, x1, y1 = sign.box
        owner[y0:y1, x0:x1] = i + 1
    return owner
