"""Scenes as training takes them: rendered once, and in batches."""

import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gridprune_cli.scenes.scene import Scene, draw, make_scene
from training import model as built
from training.plan import N, Plan

IGNORE = -100  # class number of what is not known; PyTorch's default of cross_entropy
MOST = 8  # objects in a scene


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=False
    )


def _render(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(224, 224, 3)` and the owner of each patch `(256,)`, as `patch_owners` has them."""
    picture, owner = draw(make_scene(seed))
    return np.asarray(picture), patch_owners(owner)


def patch_owners(owner: np.ndarray) -> np.ndarray:
    """The object that each patch shows `(n * n,)`, from the owners of the pixels (0 background, i + 1 object i).

    At least a quarter of the patch: the object's index. 3 % or less: -1, background. Between: -2, neither.
    """
    side = len(owner) // built.PATCH
    patches = owner.reshape(side, built.PATCH, side, built.PATCH).swapaxes(1, 2).reshape(side * side, -1)
    cover = np.stack([(patches == i + 1).mean(1) for i in range(MOST)])  # (objects, patches)
    best, share = cover.argmax(0), cover.max(0)
    return np.where(share >= 0.25, best, np.where(share > 0.03, -2, -1)).astype(np.int8)


class Pool:
    """Rendered scenes of consecutive seeds, kept on disk: drawing one takes longer than reading it again."""

    def __init__(self, folder: Path, first_seed: int, count: int):
        self.first_seed, self.count = first_seed, count
        self.paths = [folder / f"{name}-{first_seed}-{count}.npy" for name in ("pixels", "owners")]
        if not self.paths[1].exists():  # written last
            self._fill()
        self.pixels, self.owners = (np.load(p, mmap_mode="r") for p in self.paths)

    def _fill(self) -> None:
        pixels = np.lib.format.open_memmap(self.paths[0], "w+", np.uint8, (self.count, built.SIZE, built.SIZE, 3))
        owners = np.empty((self.count, N), np.int8)
        seeds = range(self.first_seed, self.first_seed + self.count)
        with progress() as bar, ProcessPoolExecutor() as workers:
            rendered = workers.map(_render, seeds, chunksize=64)
            for i, (picture, owner) in enumerate(bar.track(rendered, self.count, description="drawing scenes")):
                pixels[i], owners[i] = picture, owner
        pixels.flush()
        np.save(self.paths[1], owners)

    def scene(self, i: int) -> Scene:
        return make_scene(self.first_seed + i)

    def batch(self, step: int, plan: Plan) -> np.ndarray:
        """Indices of a step: all scenes once in random order, then all again in another."""
        epoch, at = divmod(step * plan.batch, self.count - self.count % plan.batch)
        order = np.random.default_rng([plan.first_seed, epoch]).permutation(self.count)
        return np.sort(order[at : at + plan.batch])


def normalise(pixels: np.ndarray, device: torch.device) -> Tensor:
    """What the checkpoint's image processor does to a 224 x 224 picture, for a batch `(B, 224, 224, 3)`."""
    processor = built.make_processor().image_processor
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2) / 255 - mean) / std


def some_patches(owners: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random patches of each scene, in order, objects preferred: `(B, N)` owners to `(B, count)` indices."""
    if count == owners.shape[1]:
        return torch.arange(count).expand(len(owners), count)
    priority = torch.rand(owners.shape, generator=generator) + 0.7 * (owners != -1)
    return priority.topk(count, dim=1).indices.sort(1).values


def asked_patches(owners: Tensor, asked: tuple[int, ...]) -> Tensor:
    """Patches of the objects asked for, as shares that sum to 1 (or to 0 where nothing is asked for): `(N,)`."""
    hit = torch.isin(owners, torch.tensor(asked or (-9,), dtype=owners.dtype)).float()
    return hit / hit.sum().clamp(min=1)


def vary(text: str, rng: random.Random) -> str:
    """The question as a hurried user types it, now and then: no capital, no question mark."""
    text = text[0].lower() + text[1:] if rng.random() < 0.15 else text
    return text.rstrip("?.") if rng.random() < 0.15 else text
