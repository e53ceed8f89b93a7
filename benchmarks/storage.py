"""What storing states in eight bits costs in accuracy, on held-out scenes: `python -m benchmarks.storage`.

The same questions to the embedded model, from entries as each storage makes them, computed in one dtype. A difference
is to the full storage at the same keep, question by question, with the 95 % interval that follows from its error
clustered by image. Prints the table of docs/cache.md.
"""

import argparse

import numpy as np

from gridprune_cli.cache.quantize import STORAGES
from gridprune_cli.evaluation.data import Data, open_data
from gridprune_cli.evaluation.results import Z, clustered_error
from gridprune_cli.evaluation.run import FULL, Cell, Plan, Row, Rows, answers, encode, place
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

PRUNED = Cell("gridprune", Pruning(keep=0.11))


def ask(data: Data, storage: str, dtype: str) -> tuple[Rows, int]:
    """Every answer, and the bytes of an entry."""
    pipeline = Pipeline("scenes", dtype=dtype, cache_dtype=storage)
    rows: Rows = {}
    for _ in answers(pipeline, Plan(data, (PRUNED,)), rows):
        pass
    return rows, len(encode(pipeline, data, [data.items[0]], {})[data.items[0].images[0]].to_bytes())


def column(rows: Rows, cell: Cell, data: Data) -> list[Row]:
    return [rows[place(cell, item)] for item in data.items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    data = open_data(f"scenes:{given.questions}")
    images = np.array([item.images[0] for item in data.items])
    print(f"{given.questions} held-out questions about {len(set(images))} images, computed in {given.dtype}:\n")
    print("| storage | KiB per image | keep | score | difference to full | same answer |")
    print("|---|---|---|---|---|---|")
    full: Rows = {}
    for storage in STORAGES:
        rows, size = ask(data, storage, given.dtype)
        full = full or rows
        for cell in (FULL, PRUNED):
            own, base = column(rows, cell, data), column(full, cell, data)
            scores = np.array([row.score for row in own])
            differences = scores - [row.score for row in base]
            half = 100 * Z * clustered_error(differences, images)
            same = np.mean([a.answer == b.answer for a, b in zip(own, base, strict=True)])
            shown = "" if storage == "full" else f"{100 * differences.mean():+.1f} ± {half:.1f}"
            agrees = "" if storage == "full" else f"{100 * same:.1f} %"
            print(
                f"| `{storage}` | {size / 1024:.0f} | {cell.pruning.keep:g} | {100 * scores.mean():.1f} | {shown} | "
                f"{agrees} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
