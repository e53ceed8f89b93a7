"""From answers to figures: scores with clustered errors, and every cell against all tokens, question by question."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gridprune_cli.evaluation.data import Item
from gridprune_cli.evaluation.metrics import pope_figures
from gridprune_cli.evaluation.run import FULL, Cell, Plan, Row, Rows, place
from gridprune_cli.text import markdown_cell

Z = 1.959964  # the normal distribution's quantile of 97.5 %, for an interval of 95 %
CONTAINS = 0.8  # share of an object inside the region from which the region counts as holding it


def clustered_error(values: np.ndarray, cluster: np.ndarray) -> float:
    """Standard error of the mean of `values` (Q,) where questions of one cluster (Q,) are not independent.

    The root of the summed squares of each cluster's summed residuals, over Q (arXiv 2411.00640, section 2.2).
    """
    centred = values - values.mean()
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=centred)
    return float(np.sqrt((sums**2).sum()) / len(values))


def image_clusters(images_of: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each question, (Q,), the name of its cluster: those that share an image, be it by way of others, have one.

    images_of  of each question, what tells its images apart
    """
    above: dict[str, str] = {}  # of each image another one of its cluster that sorts before it, or itself

    def first(image: str) -> str:
        while above.setdefault(image, image) != image:
            above[image] = above[above[image]]
            image = above[image]
        return image

    for images in images_of:
        joined = sorted({first(image) for image in images})
        above.update(dict.fromkeys(joined, joined[0]))
    return np.array([first(images[0]) for images in images_of])


def summarise(plan: Plan, samples: Rows) -> dict[str, Any]:
    """Every cell's figures; scores, shares and differences are 0 to 1, rounded to 6 digits.

    error       standard error of the score, clustered by image
    of_full     score over that of all tokens; None where that is 0
    difference  mean of the paired differences to all tokens, with its clustered error, and the interval of 95 % that
                follows from it under a normal approximation
    to_first    the same to the method that was named `first`, at the same keep; None for itself and for all tokens
    agreement   share of answers that are the one from all tokens, to the letter
    region      of cells with contextual regions, on questions whose place in the picture is known: the share that has
                80 % of that place inside, and the mean area of the region
    """
    items = plan.data.items
    full = _column(samples, FULL, items)
    images = len({key for keys in _image_keys(full, items) for key in keys})
    return {
        "images": images,
        "caption": _caption(len(items), images, plan.metric),
        "cells": [_figures(plan, cell, samples) for cell in plan.cells],
    }


def _image_keys(rows: list[Row], items: tuple[Item, ...]) -> list[list[str]]:
    """Of each question a key for each of its images: where a family encodes one in two ways, the first one's."""
    key_of: dict[str, str] = {}  # by the image's name
    for row, item in zip(rows, items, strict=True):
        for image, key in zip(item.images, row.key.split(), strict=True):
            key_of.setdefault(image, key)
    return [[key_of[image] for image in item.images] for item in items]


def _column(samples: Rows, cell: Cell, items: tuple[Item, ...]) -> list[Row]:
    """The answers of a cell, in the order of the questions."""
    return [samples[place(cell, item)] for item in items]


def _figures(plan: Plan, cell: Cell, samples: Rows) -> dict[str, Any]:
    """The figures of a cell, as `summarise` says."""
    items = plan.data.items
    pruned, full = (_column(samples, column, items) for column in (cell, FULL))
    score, base = (np.array([row.score for row in column]) for column in (pruned, full))
    cluster = image_clusters(_image_keys(full, items))
    category = np.array([item.category for item in items])
    first = _first(plan, cell)
    scores_of_first = first and np.array([row.score for row in _column(samples, first, items)])
    figures: dict[str, Any] = {
        "name": cell.name,
        "method": cell.pruning.method.name,
        "options": cell.options(),
        "keep": cell.pruning.keep,
        "kept": float(np.mean([row.kept for row in pruned])),
        "score": float(score.mean()),
        "error": clustered_error(score, cluster),
        "of_full": float(score.mean() / base.mean()) if base.mean() else None,
        **_paired(score - base, cluster),
        "to_first": first and {"first": first.name} | _paired(score - scores_of_first, cluster),
        "agreement": float(np.mean([a.answer == b.answer for a, b in zip(pruned, full, strict=True)])),
        "categories": {
            name: {
                "questions": int((category == name).sum()),
                "score": float(score[category == name].mean()),
                "error": clustered_error(score[category == name], cluster[category == name]),
            }
            for name in dict.fromkeys(sorted(category.tolist()))
            if name
        },
    }
    if plan.metric == "pope":
        figures["pope"] = pope_figures([row.answer for row in pruned], [item.answers[0] for item in items])
    placed = [(row.region, item.box) for row, item in zip(pruned, items, strict=True) if row.region and item.box]
    if placed:
        inside, area = zip(*(_containment(region, box) for region, box in placed if region and box), strict=True)
        share = float(np.mean([contained >= CONTAINS for contained in inside]))
        figures["region"] = {"questions": len(placed), "contains": share, "area": float(np.mean(area))}
    rounded: dict[str, Any] = _rounded(figures)
    return rounded


def _paired(differences: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    """The mean of differences (Q,) between two cells' scores of the same questions, its error, and its interval."""
    difference, error = float(differences.mean()), clustered_error(differences, cluster)
    interval = [difference - Z * error, difference + Z * error]
    return {"difference": difference, "difference_error": error, "difference_interval": interval}


def _first(plan: Plan, cell: Cell) -> Cell | None:
    """The cell of the method that was named first, at the keep of `cell`; None for itself, and for all tokens."""
    name = next((other.name for other in plan.cells if other != FULL), None)
    if cell == FULL or cell.name == name:
        return None
    return next((other for other in plan.cells if (other.name, other.pruning.keep) == (name, cell.pruning.keep)), None)


def _containment(region: tuple[int, ...], box: tuple[float, ...]) -> tuple[float, float]:
    """The share of a box (fractions of the picture) inside a region of the 8 x 8 grid, and the region's area."""
    x0, y0, x1, y1 = region[0] / 8, region[1] / 8, (region[2] + 1) / 8, (region[3] + 1) / 8
    a, b, c, d = box
    common = max(0.0, min(x1, c) - max(x0, a)) * max(0.0, min(y1, d) - max(y0, b))
    return common / ((c - a) * (d - b)), (x1 - x0) * (y1 - y0)


def _rounded(value: Any) -> Any:
    """Every float to 6 digits, but in a method's options, which are as they were set."""
    if isinstance(value, dict):
        return {name: item if name == "options" else _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, in per cent, with what the columns mean below it."""
    cells = results["cells"]
    categories = list(cells[0]["categories"])
    of_pope = {"f1": "F1", "yes_ratio": "yes"} if "pope" in cells[0] else {}
    heads = [
        "keep",
        "tokens",
        "score",
        "of full",
        *map(markdown_cell, difference_heads(cells)),
        "same answer",
        *of_pope.values(),
    ]
    heads += map(markdown_cell, categories)
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for cell in cells:
        of_full = cell["of_full"]
        row = [
            f"{cell['keep']:g}",
            f"{cell['kept']:.0f}",
            f"{_per_cent(cell['score'])} ± {_per_cent(cell['error'])}",
            "" if of_full is None else _per_cent(of_full),
            *differences(cells, cell),
            _per_cent(cell["agreement"]),
            *(_per_cent(cell["pope"][name]) for name in of_pope),
            *(_per_cent(cell["categories"][name]["score"]) for name in categories),
        ]
        lines.append(f"| {markdown_cell(cell['name'])} | " + " | ".join(row) + " |")
    lines += ["", results["caption"]]
    if line := relevance_line(results):
        lines += ["", line]
    regional = [cell for cell in cells if "region" in cell]
    for n, cell in enumerate(regional):
        if cell["region"] not in [other["region"] for other in regional[:n]]:  # one line for cells with equal regions
            lines += ["", region_line(cell | {"name": markdown_cell(cell["name"])})]
    return "\n".join(lines) + "\n"


def difference_heads(cells: list[dict[str, Any]]) -> list[str]:
    """The heads of the columns of paired differences: to all tokens, and to the first method where there are others."""
    first = next((cell["to_first"]["first"] for cell in cells if cell["to_first"]), None)
    return ["difference to full", *([f"difference to {first}"] if first else [])]


def differences(cells: list[dict[str, Any]], cell: dict[str, Any]) -> list[str]:
    """What a cell has in these columns, in points, with the interval of 95 %; nothing against itself."""
    shown = [
        _difference(cell) if cell is not cells[0] else "",
        _difference(cell["to_first"]) if cell["to_first"] else "",
    ]
    return shown[: len(difference_heads(cells))]


def _difference(paired: dict[str, Any]) -> str:
    low, high = paired["difference_interval"]
    return f"{100 * paired['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def relevance_line(results: dict[str, Any]) -> str:
    """The line about the source of relevance; nothing where no method needed it."""
    source = results.get("relevance")
    if source is None:
        return ""
    of_model = {"attention": "the language model's attention", "words": "the language model's word embeddings"}
    if source["source"] == "both":
        return f"Relevance comes from {source['model']} and {of_model['attention']}, half and half."
    return f"Relevance comes from {source['model'] or of_model[source['source']]}."


def region_line(cell: dict[str, Any]) -> str:
    """The line about a cell's contextual regions."""
    region = cell["region"]
    return (
        f"Contextual region of {cell['name']} on {region['questions']} questions about one object: at least 80 % "
        f"of it inside for {_per_cent(region['contains'])} %, mean area {_per_cent(region['area'])} % of the image."
    )


def _caption(questions: int, images: int, metric: str) -> str:
    """The line that explains the columns."""
    return (
        f"{questions} questions about {images} images, scored by `{metric}`, in per cent. ± is one standard error, "
        "clustered by image: questions about one image stand or fall together. Differences are paired, "
        "question by question; in brackets their 95 % interval, from the clustered standard error under a normal "
        "approximation. Same answer: the one from all tokens, to the letter."
    )


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f}"
