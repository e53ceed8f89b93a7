"""Measures the embedded model and the pruning methods: `python -m gridprune_cli.scenes.benchmark`.

The scenes are ones that it never saw. Every answer goes through the same code as one of `gridprune ask`, and is right
when it is the true one to the letter. Standard errors are clustered by scene: questions about one picture stand or
fall together.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from gridprune_cli.generation import generate
from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline, Pruning
from gridprune_cli.pruning.methods import make
from gridprune_cli.pruning.methods.gridprune import LITERAL
from gridprune_cli.pruning.methods.random import Random
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.scenes.scene import HELDOUT, KINDS, SIZE, TUNE, Question, Scene, draw, make_scene, questions
from gridprune_cli.tokens import EncodedImage

PER_SCENE = 4
KEEPS = (0.33, 0.22, 0.11, 0.05)
SPLITS = {"heldout": HELDOUT, "tune": TUNE}


@dataclass(frozen=True)
class Sample:
    """A question about a scene, and the scene's encoded image."""

    scene: Scene
    question: Question
    encoded: EncodedImage


def samples(pipeline: Pipeline, first_seed: int, count: int, batch: int = 32) -> Iterator[list[Sample]]:
    """Questions of consecutive scenes, `PER_SCENE` each, in batches of scenes."""
    scenes = [make_scene(first_seed + i) for i in range(-(-count // PER_SCENE))]
    for start in range(0, len(scenes), batch):
        group = scenes[start : start + batch]
        encoded = pipeline.encode([Picture(draw(s)[0], f"{s.seed:064x}", f"scene {s.seed}", ()) for s in group])
        out = []
        for scene, image in zip(group, encoded, strict=True):
            asked = questions(scene, PER_SCENE, random.Random(f"questions-{scene.seed}"))
            out += [Sample(scene, question, image) for question in asked]
        yield out


def answer(pipeline: Pipeline, group: Sequence[Sample], pruning: Pruning) -> list[str]:
    sets = []
    for sample in group:
        if isinstance(pruning.method, Random):  # one draw for all scenes would be luck, not chance
            pruning = replace(pruning, method=Random(seed=sample.scene.seed))
        sets.append(pipeline.prune(sample.encoded, sample.question.text, pruning))
    return [made.text for made in generate(pipeline.family, sets, max_new_tokens=8)]


def clustered_error(right: np.ndarray, cluster: np.ndarray) -> float:
    """Standard error of the mean of `right` (Q,) where questions of one cluster (Q,) are not independent."""
    centred = right - right.mean()
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=centred)
    return float(np.sqrt((sums**2).sum()) / len(right))


def region_figures(pipeline: Pipeline, group: Sequence[Sample]) -> list[tuple[float, float]]:
    """For questions about one object: (share of the object's box inside the region, share of the image it covers)."""
    figures = []
    measure = pipeline.family.relevance
    assert measure is not None, "the region is found from the relevance"
    for sample in group:
        if len(sample.question.asked) != 1:
            continue
        relevance = measure(sample.encoded.states, sample.question.text)
        x0, y0, x1, y1 = contextual_region(relevance, sample.encoded.views)
        left, top, right, bottom = (v * SIZE / 8 for v in (x0, y0, x1 + 1, y1 + 1))
        a, b, c, d = sample.scene.objects[sample.question.asked[0]].box
        inside = max(0, min(right, c) - max(left, a)) * max(0, min(bottom, d) - max(top, b))
        figures.append((inside / ((c - a) * (d - b)), (x1 + 1 - x0) * (y1 + 1 - y0) / 64))
    return figures


def reported() -> dict[str, Pruning]:
    """The rows of the results table: all methods at every keep."""
    rows = {"all tokens": Pruning(keep=1.0, method=make("uniform"))}
    for keep in KEEPS:
        rows[f"gridprune @ {keep}"] = Pruning(keep=keep)
        rows[f"gridprune, no region @ {keep}"] = Pruning(keep=keep, region="none")
        literal = make("gridprune", **LITERAL)
        rows[f"gridprune, literal @ {keep}"] = Pruning(keep=keep, method=literal, region="none")
        for name in ("topk-relevance", "topk", "uniform", "random"):
            rows[f"{name} @ {keep}"] = Pruning(keep=keep, method=make(name))
    for plc in ("pool", "trained"):
        for keep in (0.11, 0.05):
            rows[f"gridprune, plc {plc} @ {keep}"] = Pruning(keep=keep, plc=plc)
    rows["gridprune, compact positions @ 0.11"] = Pruning(positions="compact")
    return rows


def swept() -> dict[str, Pruning]:
    """The settings among which the defaults were chosen, at 0.11."""
    rows = {}
    for zone in (2, 4, 8):
        for temperature in (0.05, 0.1, 0.3, 1.0):
            for alpha in (0.0, 0.2, 0.5):
                method = make("gridprune", zone=zone, temperature=temperature, alpha=alpha)
                rows[f"zone {zone}, T {temperature}, a {alpha}, no region"] = Pruning(method=method, region="none")
    for share in (0.5, 0.65, 0.8, 0.9):
        for temperature in (0.1, 0.3, 1.0):
            method = make("gridprune", temperature=temperature, region_share=share)
            rows[f"T {temperature}, region share {share}"] = Pruning(method=method)
    return rows


def run(pipeline: Pipeline, rows: Mapping[str, Pruning], first_seed: int, count: int) -> dict:
    """Every row's share of right answers, overall and per kind of question, with clustered standard errors."""
    right: dict[str, list[bool]] = {name: [] for name in rows}
    kinds: list[str] = []
    clusters: list[int] = []
    regions: list[tuple[float, float]] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering", total=count * len(rows))
        for group in samples(pipeline, first_seed, count):
            kinds += [s.question.kind for s in group]
            clusters += [s.scene.seed for s in group]
            regions += region_figures(pipeline, group)
            for name, pruning in rows.items():
                said = answer(pipeline, group, pruning)
                right[name] += [a == s.question.answer for a, s in zip(said, group, strict=True)]
                bar.advance(task, len(group))
    kind, cluster = np.array(kinds), np.array(clusters)
    full = np.array(right["all tokens"], float) if "all tokens" in right else None
    table = {}
    for name, values in right.items():
        hit = np.array(values, float)
        table[name] = {
            "accuracy": float(hit.mean()),
            "error": clustered_error(hit, cluster),
            "kinds": {k: float(hit[kind == k].mean()) for k in KINDS},
        }
        if full is not None:
            table[name]["of full"] = float(hit.mean() / full.mean())
            table[name]["difference"] = float((hit - full).mean())
            table[name]["difference error"] = clustered_error(hit - full, cluster)
    inside, area = np.array(regions).T
    region = {"questions": len(regions), "80 % inside": float((inside >= 0.8).mean()), "mean area": float(area.mean())}
    counts = {"questions": len(kinds), "scenes": len(set(clusters)), "first seed": first_seed}
    return counts | {"rows": table, "region": region}


def markdown(results: dict) -> str:
    """The results as a table, in per cent."""
    lines = [
        "| | right | of full | paired difference | " + " | ".join(KINDS) + " |",
        "|---|" + "---:|" * (3 + len(KINDS)),
    ]
    for name, row in results["rows"].items():
        cells = [f"{100 * row['accuracy']:.1f} ± {100 * row['error']:.1f}"]
        if "of full" in row:
            cells += [f"{100 * row['of full']:.1f}"]
            cells += [f"{100 * row['difference']:+.1f} ± {100 * row['difference error']:.1f}"]
        else:
            cells += ["", ""]
        cells += [f"{100 * row['kinds'][kind]:.1f}" for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    region = results["region"]
    lines += [
        "",
        f"{results['questions']} questions on {results['scenes']} scenes, first seed {results['first seed']}. "
        f"± is one standard error, clustered by scene. Contextual region on {region['questions']} questions about one "
        f"object: at least 80 % of the object inside for {100 * region['80 % inside']:.1f} %, mean area "
        f"{100 * region['mean area']:.1f} % of the image.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, help="default: heldout for reported rows, tune for swept ones")
    parser.add_argument("--rows", choices=("reported", "swept"), default="reported")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, split = (reported(), "heldout") if args.rows == "reported" else (swept(), "tune")
    results = run(Pipeline(args.model), rows, SPLITS[args.split or split], args.questions)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
