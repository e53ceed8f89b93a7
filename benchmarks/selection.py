"""How long GridPrune takes to select, on one thread: `python -m benchmarks.selection`.

Every step counts: signals checked, region found, budgets, selection. Medians of 200 runs on random signals.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from gridprune_cli.pruning.methods import make
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.pruning.signals import Signals, View

HALF = 0.5
TILES = tuple(View(24, 24, (x, y, x + HALF, y + HALF)) for y in (0.0, HALF) for x in (0.0, HALF))
CASES = ((64, (View(24, 24),)), (320, (View(24, 24), *TILES)))
RUNS = 200


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of one call, after a few to warm up."""
    times = []
    for _ in range(RUNS + 20):
        start = perf_counter()
        work()
        times.append((perf_counter() - start) * 1000)
    return median(times[20:])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = make("gridprune")
    print(f"{'kept':>12}  {'no region':>10}  {'find region':>11}  {'region + select':>15}   ms")
    for k, views in CASES:
        count = sum(view.count for view in views)
        relevance, saliency = torch.rand(count) * 0.2, torch.rand(count)

        def plain(k: int = k, signals: tuple = (views, relevance, saliency)) -> None:
            method.select(Signals(*signals), k)

        def find(relevance: torch.Tensor = relevance, views: tuple[View, ...] = views) -> None:
            contextual_region(relevance, views)

        def full(k: int = k, signals: tuple = (views, relevance, saliency)) -> None:
            views, relevance, saliency = signals
            method.select(Signals(views, relevance, saliency, contextual_region(relevance, views)), k)

        row = [milliseconds(work) for work in (plain, find, full)]
        print(f"{f'{k} of {count}':>12}  {row[0]:>10.2f}  {row[1]:>11.2f}  {row[2]:>15.2f}")


if __name__ == "__main__":
    main()
