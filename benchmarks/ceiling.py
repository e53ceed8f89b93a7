"""What a choice of few tokens can reach before the language model: `python -m benchmarks.ceiling`.

Against the default stands a choice that no method can make: by the true scene it takes tokens of the objects that the
answer depends on, each in turn, those nearest to an object's centre first. What it loses against all tokens is lost to
few tokens that have not seen one another, not to a wrong choice. It is no strict bound: another choice could do better.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gridprune_cli.evaluation.data import PER_SCENE
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.runners.batches import in_order, result_or_raise
from gridprune_cli.scenes.questions import Question, questions
from gridprune_cli.scenes.scene import HELDOUT, SIZE, Scene, draw, make_scene, pixel_owners
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import EncodedImage

COUNTS = (5, 13)  # 2 and 5 % of 256
SCENES = 32  # whose questions are answered at once


@dataclass(frozen=True)
class Listed(Method):
    """The first K of the tokens that are listed."""

    name: ClassVar[str] = "listed"
    tokens: tuple[int, ...] = ()

    def select(self, signals: Signals, k: int) -> Tensor:
        return torch.tensor(sorted(self.tokens[:k]))


def nearest_first(scene: Scene, owner: np.ndarray, number: int, side: int) -> list[int]:
    """Tokens of a grid of `side` x `side`: those that an object fills by half or more, nearest to its centre first."""
    patch = SIZE // side
    filled = (owner == number + 1).reshape(side, patch, side, patch).mean((1, 3)).ravel()
    row, column = np.mgrid[0:side, 0:side] * patch + patch / 2
    x, y = scene.objects[number].centre
    distance = np.hypot(column - x, row - y).ravel()
    return sorted(range(side * side), key=lambda token: (filled[token] < 0.5, distance[token]))


def asked_tokens(scene: Scene, question: Question, count: int, side: int) -> tuple[int, ...]:
    """`count` tokens of the objects that an answer depends on, each object in turn; of all where it is of none."""
    owner = pixel_owners(scene)
    asked = question.asked or range(len(scene.objects))
    in_turn = [iter(nearest_first(scene, owner, number, side)) for number in asked]
    tokens: dict[int, None] = {}
    while len(tokens) < count:
        for of_object in in_turn:
            tokens.setdefault(next(token for token in of_object if token not in tokens))
    return tuple(tokens)[:count]


def asked_of(first: int, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """`count` scenes from a seed on, with their questions as `gridprune eval scenes` asks them."""
    for seed in range(first, first + count):
        scene = make_scene(seed)
        yield scene, questions(scene, PER_SCENE, random.Random(f"questions-{seed}"))


def encode(pipeline: Pipeline, scene: Scene) -> EncodedImage:
    file = BytesIO()
    draw(scene)[0].save(file, "PNG", compress_level=1)
    return pipeline.encode(file.getvalue())[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    count = parser.parse_args().questions // PER_SCENE
    pipeline = Pipeline("scenes")
    right: dict[str, int] = {}
    asked = 0
    for first in range(HELDOUT, HELDOUT + count, SCENES):
        batch = list(asked_of(first, min(SCENES, HELDOUT + count - first)))
        encoded = [encode(pipeline, scene) for scene, _ in batch]
        items = [(scene, image, item) for (scene, of), image in zip(batch, encoded, strict=True) for item in of]
        asked += len(items)
        side = encoded[0].views[0].rows
        cells = {"all tokens": [Pruning(keep=1.0, method=make_method("uniform"), region="none")] * len(items)}
        for k in COUNTS:
            cells[f"{k} by default"] = [Pruning(tokens=k)] * len(items)
            listed = (Listed(asked_tokens(scene, item, k, side)) for scene, _, item in items)
            cells[f"{k} of the objects asked for"] = [Pruning(tokens=k, method=method) for method in listed]
        for name, prunings in cells.items():
            requests = [
                Request((image,), item.text, pruning) for (_, image, item), pruning in zip(items, prunings, strict=True)
            ]
            runner = pipeline.runner(questions=len(requests))
            sets = [result_or_raise(result).pruned for result in in_order(runner.prune(requests))]
            answers = [result_or_raise(result).text for result in in_order(runner.generate(sets, max_new_tokens=16))]
            right[name] = right.get(name, 0) + sum(
                answer == item.answer for answer, (_, _, item) in zip(answers, items, strict=True)
            )
    for name, number in right.items():
        print(f"{name:28} {100 * number / asked:5.1f} %  {100 * number / right['all tokens']:5.1f} % of all tokens")


if __name__ == "__main__":
    main()
