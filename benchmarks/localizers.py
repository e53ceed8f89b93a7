"""Measures what finds the region: `python -m benchmarks.localizers`.

The scenes are ones that no model saw. For every question: whether the box holds at least 80 % of the pixels of what is
asked for, how much it has in common with the smallest such box on the 8 x 8 grid (intersection over union), and which
part of the image it takes. And what the embedded localiser costs beside the main model: by formula, and by time.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from gridprune_cli.encoder import Encoder
from gridprune_cli.evaluation.data import PER_SCENE
from gridprune_cli.evaluation.results import clustered_error
from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.pruning.signals import Box
from gridprune_cli.regions import ALL_TOKENS, MAX_ANSWER, VLM, Localized, read_answer
from gridprune_cli.runners.batches import result_or_raise
from gridprune_cli.runners.local import Runner
from gridprune_cli.scenes.questions import KINDS, Question, questions
from gridprune_cli.scenes.scene import CELLS, HELDOUT, SIZE, TUNE, Scene, covering, draw, make_scene, pixel_owners
from gridprune_cli.settings import RELEVANCE, Pruning, Request
from gridprune_cli.tokens import EncodedImage

SPLITS = {"heldout": HELDOUT, "tune": TUNE}  # first seeds
HELD = 0.8  # share of the pixels asked for from which a box counts as holding them
ONE = "one object"  # all questions that ask for just one, whatever their kind
_ASKED = Pruning(localizer=VLM)


# ---- how good the boxes are ------------------------------------------------------------------------------------------


def area(box: Box) -> int:
    """Cells in a box."""
    return max(0, box[2] - box[0] + 1) * max(0, box[3] - box[1] + 1)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in cells."""
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (area(a) + area(b) - shared)


def held(scene: Scene, asked: tuple[int, ...], box: Box) -> float:
    """Share of the pixels of the objects asked for that lie in the box; 1 where none are asked for."""
    shown = np.isin(pixel_owners(scene), [i + 1 for i in asked])
    cell = SIZE // CELLS
    inside = shown[box[1] * cell : (box[3] + 1) * cell, box[0] * cell : (box[2] + 1) * cell]
    return float(inside.sum() / shown.sum()) if shown.any() else 1.0


def score(scene: Scene, question: Question, box: Box) -> tuple[float, float, float]:
    """(1 where the box holds enough, intersection over union, share of the image)."""
    best = covering(scene, question.asked)
    return float(held(scene, question.asked, box) >= HELD), overlap(box, best), area(box) / CELLS**2


def by_relevance(main: Pipeline, images: Sequence[EncodedImage], asked: Sequence[Question]) -> list[Box | None]:
    measure = main.family.relevance
    return [
        contextual_region(measure(image.vision_features, question.text), image.views)
        for image, question in zip(images, asked, strict=True)
    ]


def by_model(main: Pipeline, images: Sequence[EncodedImage], asked: Sequence[Question]) -> list[Box | None]:
    return [answer.box for answer in localize(main, images, [question.text for question in asked])]


def localize(main: Pipeline, images: Sequence[EncodedImage], texts: Sequence[str]) -> list[Localized]:
    """What the embedded localiser answers to the question about each image, which it encoded itself."""
    encoder = main.localizers.find(_ASKED)
    assert encoder is not None, "the embedded model has one"
    runner = Runner(encoder, main.localizers)
    requests = [Request((image,), text, ALL_TOKENS) for image, text in zip(images, texts, strict=True)]
    answers = [result_or_raise(reply).text for reply in runner.answer(requests, max_new_tokens=MAX_ANSWER)]
    return [Localized(VLM, answer, read_answer(answer)) for answer in answers]


def run(first_seed: int, count: int, batch: int = 16) -> dict[str, Any]:
    """Scores of both ways to find a region, per kind of question."""
    main = Pipeline()
    localizer = main.localizers.find(_ASKED)
    assert localizer is not None, "the embedded model has one"
    ways: dict[str, tuple[Encoder, Callable[..., list[Box | None]]]] = {
        RELEVANCE: (main.encoder, by_relevance),
        VLM: (localizer, by_model),
    }
    scenes = [make_scene(first_seed + i) for i in range(-(-count // PER_SCENE))]
    kinds: list[str] = []
    single: list[bool] = []
    clusters: list[int] = []
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    unread = dict.fromkeys(ways, 0)
    console = Console(stderr=True)
    starts = range(0, len(scenes), batch)
    for start in track(starts, "localising", console=console, disable=not console.is_terminal):
        group = scenes[start : start + batch]
        pictures = [Picture(draw(s)[0], f"{s.seed:064x}", f"scene {s.seed}", ()) for s in group]
        asked = [(s, q) for s in group for q in questions(s, PER_SCENE, random.Random(f"questions-{s.seed}"))]
        kinds += [question.kind for _, question in asked]
        single += [len(question.asked) == 1 for _, question in asked]
        clusters += [scene.seed for scene, _ in asked]
        for name, (encoder, find) in ways.items():
            images = [image for image in encoder.encode(pictures) for _ in range(PER_SCENE)]
            boxes = find(main, images, [question for _, question in asked])
            unread[name] += boxes.count(None)
            scores[name] += [
                score(scene, question, box or (0, 0, CELLS - 1, CELLS - 1))
                for (scene, question), box in zip(asked, boxes, strict=True)
            ]
    kind, cluster = np.array(kinds), np.array(clusters)
    chosen = {"all": kind == kind, ONE: np.array(single)} | {name: kind == name for name in KINDS}
    table = {
        name: {label: _means(np.array(values)[mask], cluster[mask]) for label, mask in chosen.items() if mask.any()}
        for name, values in scores.items()
    }
    counts = {"questions": len(kinds), "scenes": len(scenes), "first seed": first_seed}
    return counts | {"unread": unread, "localizers": table}


def _means(values: np.ndarray, cluster: np.ndarray) -> dict[str, float]:
    held, common, share = values.T
    return {
        "questions": len(values),
        "held": float(held.mean()),
        "error": clustered_error(held, cluster),
        "iou": float(common.mean()),
        "area": float(share.mean()),
    }


# ---- what it costs ---------------------------------------------------------------------------------------------------


def flops(config: dict[str, Any], text: int, answer: int) -> int:
    """Floating-point operations, 2 per multiply-add, of matrix products: an image, `text` tokens around it, the answer.

    Per layer and token of n: 4 d^2 for attention's projections, 2 d m (tower) or 3 d m (Llama) for the MLP, 2 n d for
    attention itself, counted in full although the Llama's is causal. The first of `answer` tokens comes out of the
    prefill, each further one costs a token's pass. The Llama's head is run for these only, and of the tower only the
    layers up to the one that is read.
    """
    tower, language = config["vision_config"], config["text_config"]
    seen = tower["num_hidden_layers"] + 1 + config["vision_feature_layer"]  # counted from the last, -1
    d, m = tower["hidden_size"], tower["intermediate_size"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    n = patches + 1  # CLS
    total = patches * 3 * tower["patch_size"] ** 2 * d
    total += seen * n * (4 * d * d + 2 * d * m + 2 * n * d)
    h, f, layers = language["hidden_size"], language["intermediate_size"], language["num_hidden_layers"]
    total += patches * (d * h + h * h)  # projector
    length = patches + text
    total += layers * length * (4 * h * h + 3 * h * f + 2 * length * h)
    for i in range(1, answer):
        total += layers * (4 * h * h + 3 * h * f + 2 * (length + i) * h)
    return 2 * (total + answer * h * language["vocab_size"])


def cost(first_seed: int, count: int) -> dict[str, Any]:
    """The localiser beside the main model's full prefill, tower included, a picture and a question at a time."""
    main = Pipeline()
    localizer = main.localizers.find(_ASKED)
    assert localizer is not None, "the embedded model has one"
    times: dict[str, list[float]] = {"main": [], "main tower": [], VLM: [], f"{VLM} tower": []}
    lengths: list[int] = []
    answer = 0
    for i in range(-3, count):  # the first three warm up
        scene = make_scene(first_seed + max(i, 0))
        picture = Picture(draw(scene)[0], f"{scene.seed:064x}", f"scene {scene.seed}", ())
        (question,) = questions(scene, 1, random.Random(scene.seed))
        took: dict[str, float] = {}
        start = time.perf_counter()
        (image,) = main.encoder.encode([picture])
        took["main tower"] = time.perf_counter() - start
        pruned = main.prune(image, question.text, ALL_TOKENS)
        main.generate(pruned, max_new_tokens=1)
        took["main"] = time.perf_counter() - start
        start = time.perf_counter()
        (image,) = localizer.encode([picture])
        took[f"{VLM} tower"] = time.perf_counter() - start
        (localized,) = localize(main, [image], [question.text])
        took[VLM] = time.perf_counter() - start
        if i >= 0:
            lengths.append(len(pruned.input_ids) - pruned.count)
            tokenizer = localizer.family.processor.tokenizer
            answer = max(
                answer, len(tokenizer(localized.answer, add_special_tokens=False).input_ids) + 1
            )  # and its end
            for name, seconds in took.items():
                times[name].append(1e3 * seconds)
    ms = {name: statistics.median(values) for name, values in times.items()}
    text = round(statistics.mean(lengths))
    work = {
        "main": flops(main.family.checkpoint.config, text, 1),
        VLM: flops(localizer.family.checkpoint.config, text, answer),
    }
    return {
        "pictures": count,
        "threads": torch.get_num_threads(),
        "text tokens": text,
        "answer tokens": answer,
        "ms": ms,
        "time ratio": statistics.median(a / b for a, b in zip(times[VLM], times["main"], strict=True)),
        "flops": work,
        "flops ratio": work[VLM] / work["main"],
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as two tables, in per cent."""
    lines = ["| | questions | " + " | ".join(f"{name}: held, IoU, area" for name in results["localizers"]) + " |"]
    lines.append("|---|---:|" + "---:|" * len(results["localizers"]))
    first = next(iter(results["localizers"].values()))
    for label, row in first.items():
        cells = []
        for table in results["localizers"].values():
            mean = {name: 100 * value for name, value in table[label].items()}
            cells.append(f"{mean['held']:.1f} ± {mean['error']:.1f}, {mean['iou']:.1f}, {mean['area']:.1f}")
        lines.append(f"| {label} | {row['questions']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{results['questions']} questions on {results['scenes']} scenes, first seed {results['first seed']}. "
        f"± is one standard error, clustered by scene. Answers of {VLM} that were no box: {results['unread'][VLM]}.",
    ]
    if "cost" in results:
        price = results["cost"]
        ms, work = price["ms"], price["flops"]
        lines += [
            "",
            "| | GFLOP | ms | of it the tower |",
            "|---|---:|---:|---:|",
            f"| full prefill of `scenes` | {work['main'] / 1e9:.2f} | {ms['main']:.1f} | {ms['main tower']:.1f} |",
            f"| `{VLM}`, to the end of its answer | {work[VLM] / 1e9:.2f} | {ms[VLM]:.1f} | {ms[f'{VLM} tower']:.1f} |",
            f"| ratio | {work[VLM] / work['main']:.3f} | {price['time ratio']:.3f} | |",
            "",
            f"Medians over {price['pictures']} pictures, one at a time, side by side, {price['threads']} threads; the "
            "ratio is the median of the pictures' ratios.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=50, help="for the cost; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    results = run(SPLITS[args.split], args.questions)
    if args.pictures:
        results["cost"] = cost(SPLITS[args.split], args.pictures)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
