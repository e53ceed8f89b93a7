"""Scenes: small synthetic pictures with known contents.

A scene is a 224 x 224 picture with 2 to 8 coloured shapes, each carrying a digit or a letter, over a textured, noisy
background with distracting marks. Everything follows from one integer seed, so a scene never needs to be stored.

Seeds are split by range, and the ranges never meet: `TRAIN` is what the embedded model learns from, `TUNE` is where
defaults are chosen, `HELDOUT` is what is reported, `SAMPLES` are the pictures in `sample_images/`.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

TRAIN, TUNE, HELDOUT, SAMPLES = 0, 1_000_000_000, 2_000_000_000, 3_000_000_000  # first seed of each split

SIZE = 224  # pixels, both sides
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "cyan": (60, 210, 225),
    "blue": (40, 70, 215),
    "purple": (140, 60, 175),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
CHARACTERS = "0123456789ACEFHJKLMPRTUX"  # letters that look like a digit (B, I, O, S, ...) are left out
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

CELLS = 8  # along each side of CROP's grid (arXiv 2505.21233), in whose cells boxes are counted

_OVERSAMPLE = 2  # objects are drawn larger and scaled down, for smooth edges


@dataclass(frozen=True)
class SceneObject:
    """One shape: its outer box `(x0, y0, x1, y1)` in pixels (x1, y1 exclusive), colour, shape and character."""

    box: tuple[int, int, int, int]
    colour: str
    shape: str
    character: str

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Which of the nine places of a 3 x 3 division of the picture holds the centre."""
        x, y = self.centre
        return PLACES[int(3 * y / SIZE) * 3 + int(3 * x / SIZE)]


@dataclass(frozen=True)
class Scene:
    """The contents of one picture. `draw` makes the picture."""

    seed: int
    objects: tuple[SceneObject, ...]


def make_scene(seed: int) -> Scene:
    """The scene of a seed. Centres keep 5 pixels off the lines between the nine places; boxes never overlap."""
    rng = random.Random(seed)
    n = rng.randint(2, 8)
    palette = rng.sample(list(COLOURS), rng.randint(2, 6))  # few colours and shapes: repeats make counting and
    shapes = rng.sample(SHAPES, rng.randint(2, 5))  # "which of the red ones" worth asking
    objects: list[SceneObject] = []
    for cell in rng.sample(range(9), n):
        for _ in range(50):
            size = rng.randint(38, 58)
            row, col = divmod(cell, 3)
            half = size / 2
            x = _between(rng, col * SIZE / 3 + 5, (col + 1) * SIZE / 3 - 5, half)
            y = _between(rng, row * SIZE / 3 + 5, (row + 1) * SIZE / 3 - 5, half)
            box = (round(x - half), round(y - half), round(x - half) + size, round(y - half) + size)
            if not any(_near(box, other.box) for other in objects):
                objects.append(SceneObject(box, rng.choice(palette), rng.choice(shapes), rng.choice(CHARACTERS)))
                break
    return Scene(seed, tuple(objects))


def _between(rng: random.Random, low: float, high: float, half: float) -> float:
    """A centre in [low, high] whose object of half-size `half` stays inside the picture."""
    return rng.uniform(max(low, half + 1), min(high, SIZE - half - 1))


def _near(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    gap = 2
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def covering(scene: Scene, asked: tuple[int, ...], margin: int = 0) -> tuple[int, int, int, int]:
    """The inclusive box on the 8 x 8 grid that covers the objects asked for; all of the grid where there are none.

    To say that something is nowhere, one must have looked everywhere. A margin, in pixels, is added on all sides, as
    far as the picture goes.
    """
    if not asked:
        return 0, 0, CELLS - 1, CELLS - 1
    x0, y0, x1, y1 = zip(*(scene.objects[i].box for i in asked), strict=True)
    low = [max(0, min(v) - margin) for v in (x0, y0)]
    high = [min(SIZE, max(v) + margin) - 1 for v in (x1, y1)]
    left, top, right, bottom = (v * CELLS // SIZE for v in (*low, *high))
    return left, top, right, bottom


def neighbour(scene: Scene, i: int, direction: str) -> int | None:
    """The object next to object i in a direction: its index, -1 for none, None where people could disagree.

    Next is the nearest centre within 45 degrees of the direction. It is open to dispute when another object is about
    as near, or lies about on the diagonal; "nothing" is beyond dispute when even a wider cone is empty.
    """
    dx, dy = DIRECTIONS[direction]
    x, y = scene.objects[i].centre
    inside, border = [], []
    for j, other in enumerate(scene.objects):
        along = (other.centre[0] - x) * dx + (other.centre[1] - y) * dy
        across = abs((other.centre[0] - x) * dy) + abs((other.centre[1] - y) * dx)
        if j == i or along <= 0:
            continue
        distance = float(np.hypot(along, across))
        if across <= 0.8 * along:
            inside.append((distance, j))
        elif across <= 1.6 * along:
            border.append(distance)
    if not inside:
        return None if border else -1
    inside.sort()
    nearest, j = inside[0]
    rivals = border + [distance for distance, _ in inside[1:]]
    return None if any(distance < 1.25 * nearest for distance in rivals) else j


def pixel_owners(scene: Scene) -> np.ndarray:
    """Which object each pixel shows: `(224, 224)` uint8, 0 for background, i + 1 for object i."""
    owner = np.zeros((SIZE, SIZE), np.uint8)
    for i, obj in enumerate(scene.objects):
        x0, y0, x1, y1 = obj.box
        owner[y0:y1, x0:x1][np.asarray(shape_mask(obj.shape, x1 - x0)) > 127] = i + 1
    return owner


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """The picture, and which object each pixel shows, as `pixel_owners` has it."""
    rng = np.random.default_rng(scene.seed)
    picture = background(rng)
    distract(rng, picture)
    for obj in scene.objects:
        mask = shape_mask(obj.shape, obj.box[2] - obj.box[0])
        tint = tuple(int(v) for v in np.clip(np.array(COLOURS[obj.colour]) + rng.integers(-12, 13, 3), 0, 255))
        picture.paste(tint, obj.box[:2], mask)
        _write(picture, obj, tint)
    pixels = np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(2, 8), (SIZE, SIZE, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), pixel_owners(scene)


def background(rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Dull colours in blotches, with stripes, checks or neither on top."""
    base = rng.integers(70, 170) + rng.integers(-15, 16, 3)
    blotch = rng.normal(0, 22, (int(rng.integers(3, 12)),) * 2 + (1,)) + rng.normal(0, 6, 3)
    small = np.clip(base + blotch, 0, 255).astype(np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    texture, period = rng.integers(3), rng.integers(8, 40)
    y, x = np.mgrid[:size, :size]
    if texture == 0:
        wave = np.sign(np.sin((x * np.cos(base[0]) + y * np.sin(base[0])) * 2 * np.pi / period))
    elif texture == 1:
        wave = ((x // period + y // period) % 2) * 2.0 - 1
    else:
        wave = np.zeros((size, size))
    return Image.fromarray((picture + wave[..., None] * rng.uniform(4, 14)).clip(0, 255).astype(np.uint8))


def distract(rng: np.random.Generator, picture: Image.Image, biggest: int = 5) -> None:
    """Marks that no question is about: thin lines, and dots too small to be an object, some in the objects' colours."""
    pen = ImageDraw.Draw(picture)
    tints = list(COLOURS.values())
    for _ in range(rng.integers(0, 6)):
        x0, y0, x1, y1 = (int(v) for v in rng.integers(0, picture.width, 4))
        pen.line((x0, y0, x1, y1), fill=tints[rng.integers(len(tints))], width=int(rng.integers(1, 3)))
    for _ in range(rng.integers(0, 12)):
        x, y, r = (int(v) for v in (*rng.integers(0, picture.width, 2), rng.integers(2, biggest + 1)))
        mark = pen.ellipse if rng.integers(2) else pen.rectangle
        mark((x - r, y - r, x + r, y + r), fill=tints[rng.integers(len(tints))])


@cache
def shape_mask(shape: str, size: int) -> Image.Image:
    s = size * _OVERSAMPLE
    mask = Image.new("L", (s, s))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, s - 1, s - 1), fill=255)
    elif shape == "square":
        m = s * 0.06
        pen.rectangle((m, m, s - m, s - m), fill=255)
    elif shape == "triangle":
        pen.polygon([(s / 2, 0), (s, s * 0.95), (0, s * 0.95)], fill=255)
    elif shape == "diamond":
        pen.polygon([(s / 2, 0), (s, s / 2), (s / 2, s), (0, s / 2)], fill=255)
    elif shape == "cross":
        pen.rectangle((s * 0.28, 0, s * 0.72, s), fill=255)
        pen.rectangle((0, s * 0.28, s, s * 0.72), fill=255)
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, s / 2, s * 0.24)
        pen.polygon(
            [(s / 2 + r * np.cos(a), s / 2 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], fill=255
        )
    else:
        raise ValueError(f"unknown shape: {shape}")
    return mask.resize((size, size), Image.Resampling.LANCZOS)


@cache
def glyph(character: str, height: int) -> tuple[Image.Image, Image.Image]:
    """Ink and outline masks of a character whose ink is about `height` pixels tall."""
    font = ImageFont.load_default(round(height / 0.72))  # capitals of Pillow's built-in font are 0.72 em tall
    masks = []
    for stroke in (0, 2):
        mask = Image.new("L", (2 * height, 2 * height))
        ImageDraw.Draw(mask).text((height, height), character, 255, font=font, anchor="mm", stroke_width=stroke)
        masks.append(mask)
    bold = ImageChops.lighter(masks[0], ImageChops.offset(masks[0], 1, 0))  # the font has one weight only
    return bold, ImageChops.lighter(masks[1], ImageChops.offset(masks[1], 1, 0))


def _write(picture: Image.Image, obj: SceneObject, tint: tuple[int, ...]) -> None:
    """The character, in black or white, outlined in the shape's colour where it leaves the shape."""
    height = max(24, round((obj.box[2] - obj.box[0]) * 0.56))
    ink, outline = glyph(obj.character, height)
    x, y = obj.centre
    y += 0.1 * (obj.box[3] - obj.box[1]) if obj.shape == "triangle" else 0
    corner = (round(x) - height, round(y) - height)
    bright = 0.3 * tint[0] + 0.59 * tint[1] + 0.11 * tint[2] > 125
    picture.paste(tint, corner, outline)
    picture.paste((0, 0, 0) if bright else (255, 255, 255), corner, ink)


# (3, 256): of a channel's value, a bit for each colour that it is near to
_NEAR = sum(
    (np.abs(np.arange(256)[None] - np.array(colour)[:, None]) <= 22).astype(np.uint32) << bit
    for bit, colour in enumerate(COLOURS.values())
)


def looks_like_scene(picture: Image.Image) -> bool:
    """Whether an RGB picture can be a scene: of its size, a share of its pixels in the palette's plain colours."""
    if picture.size != (SIZE, SIZE):
        return False
    smooth = picture.reduce(2)  # averages most of the noise away
    red, green, blue = np.moveaxis(np.asarray(smooth), -1, 0)
    return bool(((_NEAR[0, red] & _NEAR[1, green] & _NEAR[2, blue]) > 0).mean() >= 0.02)
