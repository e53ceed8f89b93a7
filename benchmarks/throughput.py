"""How fast many images are encoded and many questions answered, against what the model alone allows.

    python -m benchmarks.throughput encode --images 2000
    python -m benchmarks.throughput encode --shape llava-1.5-7b --images 8 --shares 2
    python -m benchmarks.throughput questions --images 500

`encode`: the command's engine, files to cache, against a bare loop of the tower over the same batches, which lie
decoded and normalised in memory; of the whole tower, as transformers loads it, and of its layers up to the one that is
read, which are what the engine runs. With a published shape, random weights of its size take the place of the embedded
model, and only these layers are compared. `questions`: the engine of `batch` against `Pipeline.ask` called one by one,
and against transformers' own `generate` on batches with all tokens, whose inputs lie ready in memory. Everything runs
in this process, in turn, share by share; a ratio is taken of each share's times, and of their sums, and also of the
CPU time of all threads, which other processes on the machine change less.
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
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gridprune_cli.cache.store import open_store
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners.batches import result_or_raise
from gridprune_cli.scenes import CHECKPOINT
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, SIZE, draw, make_scene
from gridprune_cli.settings import Request
from gridprune_cli.vlm.llava import Llava
from gridprune_cli.vlm.shapes import SHAPES, build, find_shape

IMAGES = 16  # the command's batch of images
QUESTIONS = 32  # and of questions
WINDOW = 512  # lines that `batch` looks at together
PER_IMAGE = 8
PICTURE = (640, 480)  # pixels of the scenes that a published shape encodes: as photographs in data sets are


class Cost(NamedTuple):
    """Seconds: on the clock, and on CPUs, of all threads together."""

    wall: float
    cpu: float


@contextmanager
def timed(costs: list[Cost]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    costs.append(Cost(time.perf_counter() - wall, time.process_time() - cpu))


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


def encode(paths: list[Path], cache: Path, count: int, shape: str | None) -> None:
    # encoding does not run the language model: a layer of it is enough
    family = build(find_shape(shape), torch.float32, "cpu", layers=1) if shape else None
    towers: dict[str, Any] = {}
    if family is None:
        model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        towers["tower"] = model.model.vision_tower
    ours: list[Cost] = []
    others: dict[str, list[Cost]] = {}
    for number, share in enumerate([paths[: 1 if family else IMAGES], *shares(paths, count)]):
        pipeline = Pipeline(family, store=open_store(cache / str(number))) if family else fresh(cache, number)
        towers["its layers that are read"] = pipeline.family.load("tower").model.vision_tower
        pictures = [load_image(path).image for path in share]
        pixels = [pipeline.family.process(picture)[0]["pixel_values"] for picture in pictures]
        batches = [torch.cat(pixels[i : i + IMAGES]) for i in range(0, len(pixels), IMAGES)]
        del pictures, pixels

        def engine(pipeline: Pipeline = pipeline, share: Sequence[Path] = share) -> None:
            with timed(ours), pipeline:
                hits = [hit for _, _, hit in pipeline.encode_all(share, batch=IMAGES)]
            assert len(hits) == len(share) and not any(hits)

        def loop(name: str, batches: Sequence[torch.Tensor] = batches) -> None:
            with timed(others.setdefault(name, [])), torch.inference_mode():
                for batch in batches:
                    towers[name](batch, output_hidden_states=True)

        in_turn(number, engine, *(partial(loop, name) for name in towers))
    report("encode", len(paths), "images", ours, others)


def ask(paths: list[Path], cache: Path, count: int) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    ours: list[Cost] = []
    single: list[Cost] = []
    plain: list[Cost] = []
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
    report("batch", total, "questions", ours, {"ask, one by one": single, "generate, all tokens": plain})
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


def report(name: str, count: int, what: str, costs: list[Cost], others: dict[str, list[Cost]]) -> None:
    """Prints speeds, and how many times as fast as the others the first is, without the shares that warmed up."""
    wall, cpu = (sum(of_shares) for of_shares in zip(*costs[1:], strict=True))
    print(f"{name:24} {count / wall:8.1f} {what}/s, {1e3 * cpu / count:.1f} ms of CPU each")
    for other, costs_of_other in others.items():
        ratios = [b.wall / a.wall for a, b in zip(costs[1:], costs_of_other[1:], strict=True)]
        other_wall, other_cpu = (sum(of_shares) for of_shares in zip(*costs_of_other[1:], strict=True))
        print(
            f"{other:24} {count / other_wall:8.1f} {what}/s, {1e3 * other_cpu / count:.1f} ms   {name} is "
            f"{other_wall / wall:.2f} times as fast (shares: {min(ratios):.2f} to {max(ratios):.2f}), by CPU time "
            f"{other_cpu / cpu:.2f}"
        )


def seed(path: Path) -> int:
    return int(path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "questions"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--shares", type=int, default=10)
    parser.add_argument("--shape", choices=[name for name, shape in SHAPES.items() if shape.family is Llava])
    options = parser.parse_args()
    if options.shape and options.what != "encode":
        parser.error("--shape is of encode alone: a shape's answers have no end")
    size = PICTURE if options.shape else (SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        pictures, cache = Path(folder, "pictures"), Path(folder, "cache")
        pictures.mkdir()
        paths = [pictures / f"{HELDOUT + number}.png" for number in range(options.images)]
        for path in paths:
            draw(make_scene(seed(path)))[0].resize(size).save(path)
        print(f"{options.images} images, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if options.what == "encode":
            encode(paths, cache, options.shares, options.shape)
        else:
            ask(paths, cache, options.shares)


if __name__ == "__main__":
    main()
