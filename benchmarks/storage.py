"""What storing in eight bits costs in accuracy, on held-out scenes: `python -m benchmarks.storage`.

With `--relevance attention`, prefixes are stored so as well as vision features, and count among an image's bytes.

The same questions to the embedded model, from entries of each storage, computed in one dtype. A difference
is to the full storage at the same keep, question by question, with the 95 % interval that follows from its error
clustered by image. Prints the table of docs/cache.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gridprune_cli.cache.quantize import STORAGES
from gridprune_cli.cache.store import Store
from gridprune_cli.evaluation.data import Data, open_data
from gridprune_cli.evaluation.results import Z, clustered_error
from gridprune_cli.evaluation.run import FULL, Cell, Plan, Row, Rows, answers, place
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

PRUNED = Cell("gridprune", Pruning(keep=0.11))


def ask(data: Data, storage: str, dtype: str, relevance: str) -> tuple[Rows, float]:
    """Every answer, and the mean bytes of an image in the cache."""
    samples: Rows = {}
    with TemporaryDirectory() as folder, Store(Path(folder), limit=None) as store:
        pipeline = Pipeline("scenes", dtype=dtype, relevance=relevance, cache_dtype=storage, store=store)
        for _ in answers(pipeline, Plan(data, (PRUNED,)), samples):
            pass
        size = sum(entry.bytes for entry in store.entries()) / len({item.images[0] for item in data.items})
    return samples, size


def column(samples: Rows, cell: Cell, data: Data) -> list[Row]:
    return [samples[place(cell, item)] for item in data.items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--relevance", default="auto")
    options = parser.parse_args()
    data = open_data(f"scenes:{options.questions}")
    images = np.array([item.images[0] for item in data.items])
    print(f"{options.questions} held-out questions about {len(set(images))} images, computed in {options.dtype}:\n")
    print("| storage | KiB per image | keep | score | difference to full | same answer |")
    print("|---|---|---|---|---|---|")
    full: Rows = {}
    for storage in STORAGES:
        samples, size = ask(data, storage, options.dtype, options.relevance)
        full = full or samples
        for cell in (FULL, PRUNED):
            answered, base = column(samples, cell, data), column(full, cell, data)
            scores = np.array([row.score for row in answered])
            differences = scores - [row.score for row in base]
            half = 100 * Z * clustered_error(differences, images)
            same = np.mean([a.answer == b.answer for a, b in zip(answered, base, strict=True)])
            shown = "" if storage == "full" else f"{100 * differences.mean():+.1f} ± {half:.1f}"
            agrees = "" if storage == "full" else f"{100 * same:.1f} %"
            print(
                f"| `{storage}` | {size / 1024:.0f} | {cell.pruning.keep:g} | {100 * scores.mean():.1f} | {shown} | "
                f"{agrees} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
