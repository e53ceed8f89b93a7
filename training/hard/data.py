"""Hard scenes as training takes them: what each patch shows, and the pictures, kept on disk."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gridprune_cli.scenes.scene import COLOURS, SHAPES
from training.data import IGNORE, Pool, progress
from training.hard.model import WIDTH
from training.hard.scene import GRID, LETTERS, PATCH, SIZE, HardScene, N, draw, make_scene, pixel_owners

# classes of what a patch shows itself, 0 for nothing: surface (colour of an object, then of a sign), shape of the
# object whose centre it holds, letter; and which of the nine places it lies in
CLASSES = (2 * len(COLOURS) + 1, len(SHAPES) + 1, len(LETTERS) + 1, 9)


def contents(scene: HardScene) -> np.ndarray:
    """What each patch shows, `(5, 576)` int8: its owner, and the classes of `CLASSES`, `IGNORE` where unclear.

    The owner is the index of an object (signs count on), -1 for background, -2 for 3 to 25 % of something.
    """
    colours = list(COLOURS)
    blocks = pixel_owners(scene).reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(N, -1)
    count = len(scene.objects) + len(scene.signs)
    cover = np.stack([(blocks == i + 1).mean(1) for i in range(count)])  # (count, N)
    share = cover.max(0)
    owner = np.where(share >= 0.25, cover.argmax(0), np.where(share > 0.03, -2, -1))
    for i, obj in enumerate(scene.objects):
        owner[obj.centre_patch] = i
    surfaces = [1 + colours.index(o.colour) for o in scene.objects]
    surfaces += [1 + len(colours) + colours.index(s.colour) for s in scene.signs]
    surface = np.where(owner >= 0, np.array(surfaces)[owner.clip(min=0)], np.where(owner == -2, IGNORE, 0))
    shape, letter = np.zeros((2, N), int)
    for obj in scene.objects:
        shape[obj.centre_patch] = 1 + SHAPES.index(obj.shape)
    for sign in scene.signs:
        letter[list(sign.patches)] = [1 + LETTERS.index(x) for x in sign.text]
    row, column = np.divmod(np.arange(N), GRID)
    place = row * 3 // GRID * 3 + column * 3 // GRID
    return np.stack([owner, surface, shape, letter, place]).astype(np.int8)


def one_hot(table: Tensor) -> Tensor:
    """Contents of patches `(B, n, 4)` as vectors `(B, n, WIDTH)`, one-hot side by side, zeros where unclear."""
    vectors = [
        F.one_hot(table[..., i].clamp(min=0), classes) * (table[..., i : i + 1] >= 0)
        for i, classes in enumerate(CLASSES)
    ]
    return F.pad(torch.cat(vectors, -1).float(), (0, WIDTH - sum(CLASSES)))


def _picture(seed: int) -> np.ndarray:
    return np.asarray(draw(make_scene(seed)))


def _contents(seed: int) -> np.ndarray:
    return contents(make_scene(seed))


class HardPool(Pool):
    """Hard scenes of consecutive seeds, kept on disk: contents `(count, 5, N)`, and `pixels` where they are drawn."""

    def __init__(self, folder: Path, first_seed: int, count: int, *, drawn: bool):
        self.first_seed, self.count = first_seed, count
        name = f"{first_seed}-{count}.npy"
        self.contents = _stored(folder / f"contents-{name}", _contents, (5, N), np.int8, self)
        if drawn:
            self.pixels = _stored(folder / f"pixels-{name}", _picture, (SIZE, SIZE, 3), np.uint8, self)

    def scene(self, i: int) -> HardScene:
        return make_scene(self.first_seed + i)


def _stored(
    path: Path, compute: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: type, pool: Pool
) -> np.ndarray:
    """What `compute` gives for each seed of a pool, `(count, *shape)`, computed once and mapped from disk."""
    if not path.exists():
        partial = path.with_suffix(".tmp")
        out = np.lib.format.open_memmap(partial, "w+", dtype, (pool.count, *shape))
        seeds = range(pool.first_seed, pool.first_seed + pool.count)
        with progress() as bar, ProcessPoolExecutor() as workers:
            computed = workers.map(compute, seeds, chunksize=64)
            for i, value in enumerate(bar.track(computed, pool.count, description="scenes")):
                out[i] = value
        out.flush()
        partial.replace(path)
    return np.load(path, mmap_mode="r")
