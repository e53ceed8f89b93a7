"""Where `benchmarks.gpu` runs, what fits there, and the rows that its checks give."""

import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import torch

from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.vlm.shapes import build, find_shape

SHAPES = {"llava-1.5-7b": "llava", "qwen2.5-vl-7b": "qwen2_5_vl"}  # and the tiny checkpoints in their place
LAYER_BYTES, OTHER_BYTES = 0.42e9, 4.5e9  # of a 7B shape in bfloat16: a layer; the rest, a batch's keys and values too


@dataclass(frozen=True)
class Row:
    """One line of the table. `met` is None where there is no target, or none that counts on this machine."""

    check: str
    value: str
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Machine:
    """Where it runs, and what fits there. `free` is bytes of memory on a GPU, else None; `folder` is scratch space."""

    device: str
    name: str
    free: int | None
    folder: Path

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def judge(self, met: bool) -> bool | None:
        """Whether a target of speed is met, where it counts."""
        return met if self.is_gpu else None

    def open(self, shape: str) -> Pipeline:
        """A pipeline of a 7B shape, with as many layers as there is memory for; elsewhere of the tiny checkpoint."""
        store = open_store(Path(tempfile.mkdtemp(dir=self.folder)))
        if not self.is_gpu:
            return Pipeline(str(self.tiny(SHAPES[shape])), device=self.device, dtype="float32", store=store)
        most, room = find_shape(shape).layers, int(((self.free or 0) - OTHER_BYTES) / LAYER_BYTES)
        if room < 2:
            raise GridpruneError(f"{(self.free or 0) / 1e9:.1f} GB are free; a 7B shape's rest takes {OTHER_BYTES:.1e}")
        family = build(find_shape(shape), torch.bfloat16, self.device, layers=min(most, room))
        return Pipeline(family, store=store)

    def tiny(self, name: str) -> Path:
        """The tiny checkpoint of a family."""
        folder = self.folder / f"tiny-{name}"
        return folder if folder.exists() else import_module("tiny_families").write_checkpoint(name, folder)

    @cached_property
    def scenes(self) -> list[Path]:
        """Image files of 640 x 427 pixels: 256 on a GPU, else 8."""
        paths = [self.folder / f"{HELDOUT + n}.jpg" for n in range(256 if self.is_gpu else 8)]
        for path in paths:
            draw(make_scene(int(path.stem)))[0].resize((640, 427)).save(path)
        return paths

    def release(self) -> None:
        """Gives back what models held that nothing holds any more."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def attempt(name: str, check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a check; where it fails, its traceback goes to stderr, and a row says so."""
    try:
        yield from check()
    except Exception as error:  # the other checks are still worth their time
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0][:200]
        yield Row(name, f"{type(error).__name__}: {first}", "run", False)


@contextmanager
def timed(machine: Machine, seconds: list[float]) -> Iterator[None]:
    machine.synchronize()
    start = time.perf_counter()
    yield
    machine.synchronize()
    seconds.append(time.perf_counter() - start)


def find_tests(root: Path) -> None:
    """Has `tiny_families` importable, which lies among the tests of a checkout."""
    if not (root / "tests" / "tiny_families").is_dir():
        raise GridpruneError(f"{root}/tests/tiny_families is not there; run this in a checkout of the repository")
    sys.path.insert(0, str(root / "tests"))
