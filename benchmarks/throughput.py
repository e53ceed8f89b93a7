"""How fast many images are encoded and many questions answered, against what the model alone allows.

    python -m benchmarks.throughput encode --images 2000
    python -m benchmarks.throughput questions --images 500

`encode`: the command's engine, files to cache, against a bare loop of the tower over the same batches, which lie
decoded and normalised in memory; of the whole tower, as transformers loads it, and of its layers up to the one that is
read, which are what the engine runs. `questions`: the engine of `batch` against `Pipeline.ask` called one by one,
and against transformers' own `generate` on batches with all tokens, whose inputs lie ready in memory. Everything runs
in this process, in turn, share by share; a ratio is taken of each share's times, and of their sums.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gridprune_cli.cache.store import open_store
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners.batches import result_or_raise
from gridprune_cli.scenes import CHECKPOINT
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.settings import Request

IMAGES = 16  # the command's batch of images
QUESTIONS = 32  # and of questions
WINDOW = 512  # lines that `batch` looks at together
PER_IMAGE = 8


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def shares(paths: Sequence[Path], count: int) -> list[Sequence[Path]]:
    size = -(-len(paths) // count)
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def fresh(cache: Path, name: object) -> Pipeline:
    """The embedded model, its parts loaded, with an empty cache."""
    pipeline = Pipeline("scenes", store=open_store(cache / str(name)))
    pipeline.family.load("tower", "projector", "language")
    pipeline.family.relevance.load()
    _ = pipeline.family.encoder
    return pipeline


def in_turn(number: int, *work: Callable[[], None]) -> None:
    """Runs each, another one first each time: what comes first finds another machine than what comes last."""
    for i in range(len(work)):
        work[(number + i) % len(work)]()


def encode(paths: list[Path], cache: Path, count: int) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval().model.vision_tower
    ours: list[float] = []
    bare: list[float] = []
    read: list[float] = []
    for number, share in enumerate([paths[:IMAGES], *shares(paths, count)]):
        pipeline = fresh(cache, number)
        layers = pipeline.family.load("tower").model.vision_tower
        pictures = [load_image(path).image for path in share]
        pixels = [pipeline.family.process(picture)[0]["pixel_values"] for picture in pictures]
        batches = [torch.cat(pixels[i : i + IMAGES]) for i in range(0, len(pixels), IMAGES)]
        del pictures, pixels

        def engine(pipeline: Pipeline = pipeline, share: Sequence[Path] = share) -> None:
            with timed(ours), pipeline:
                hits = [hit for _, _, hit in pipeline.encode_all(share, batch=IMAGES)]
            assert len(hits) == len(share) and not any(hits)

        def loop(times: list[float], tower: Any, batches: Sequence[torch.Tensor] = batches) -> None:
            with timed(times), torch.inference_mode():
                for batch in batches:
                    tower(batch, output_hidden_states=True)

        in_turn(number, engine, partial(loop, bare, whole), partial(loop, read, layers))
    others = {"tower": bare[1:], "its layers that are read": read[1:]}  # the first share warmed up
    tell("encode", len(paths), "images", ours[1:], others)


def ask(paths: list[Path], cache: Path, count: int) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    ours: list[float] = []
    single: list[float] = []
    plain: list[float] = []
    different = total = 0
    for number, share in enumerate([paths[:4], *shares(paths, count)]):
        requests = [
            Request((path,), question.text)
            for path in share
            for question in questions(make_scene(seed(path)), PER_IMAGE, random.Random(f"throughput-{path.name}"))
        ]
        bulk, alone = (fresh(cache, f"{number}-{name}") for name in ("bulk", "alone"))
        inputs = list(whole_inputs(processor, requests))
        answers: list[str] = []
        expected: list[str] = []

        def engine(bulk: Pipeline = bulk, requests: list[Request] = requests, out: list[str] = answers) -> None:
            with timed(ours), bulk:
                runner = bulk.runner(images=IMAGES, questions=QUESTIONS)
                for start in range(0, len(requests), WINDOW):
                    replies = runner.answer(requests[start : start + WINDOW])
                    out += [result_or_raise(reply).text for reply in replies]

        def one_by_one(alone: Pipeline = alone, requests: list[Request] = requests, out: list[str] = expected) -> None:
            with timed(single), alone:
                out += [alone.ask(request.images, request.question).text for request in requests]

        def all_tokens(inputs: list[Any] = inputs) -> None:
            with timed(plain), torch.inference_mode():
                for batch in inputs:
                    whole.generate(**batch, max_new_tokens=128, do_sample=False)

        in_turn(number, engine, one_by_one, all_tokens)
        if number:
            different += sum(a != b for a, b in zip(answers, expected, strict=True))
            total += len(requests)
    others = {"ask, one by one": single[1:], "generate, all tokens": plain[1:]}
    tell("batch", total, "questions", ours[1:], others)
    print(f"answers other than those of single runs: {different} of {total}")
    if different:
        sys.exit(1)


def whole_inputs(processor: Any, requests: Sequence[Request]) -> Iterator[Any]:
    """The inputs of transformers' own `generate`, in batches."""
    for start in range(0, len(requests), QUESTIONS):
        batch = requests[start : start + QUESTIONS]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.question}]}],
                add_generation_prompt=True,
            )
            for request in batch
        ]
        images = [Image.open(str(request.images[0])).convert("RGB") for request in batch]
        yield processor(images=images, text=texts, padding=True, return_tensors="pt")


def tell(name: str, count: int, what: str, ours: list[float], others: dict[str, list[float]]) -> None:
    print(f"{name:24} {count / sum(ours):8.1f} {what}/s")
    for other, times in others.items():
        ratios = [b / a for a, b in zip(ours, times, strict=True)]
        print(
            f"{other:24} {count / sum(times):8.1f} {what}/s   {name} is {sum(times) / sum(ours):.2f} times as fast "
            f"(shares: {min(ratios):.2f} to {max(ratios):.2f})"
        )


def seed(path: Path) -> int:
    return int(path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "questions"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--shares", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures, cache = Path(folder, "pictures"), Path(folder, "cache")
        pictures.mkdir()
        paths = [pictures / f"{HELDOUT + number}.png" for number in range(options.images)]
        for path in paths:
            draw(make_scene(seed(path)))[0].save(path)
        print(f"{options.images} images, {torch.get_num_threads()} threads, torch {torch.__version__}")
        (encode if options.what == "encode" else ask)(paths, cache, options.shares)


if __name__ == "__main__":
    main()
