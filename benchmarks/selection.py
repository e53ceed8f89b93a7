"""How long selecting takes, on one thread: `python -m benchmarks.selection`.

In milliseconds of processor time, in which other work on the machine hardly counts. First GridPrune, then all methods,
then the rules by which tokens leave inside the language model, without what is measured there for them. Every step
counts: signals checked, region found, budgets, selection. Random signals; medians of 200 runs, and of 11 in the other
tables.
"""

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import torch

from gridprune_cli.pruning.methods import METHODS, RULES, make_method
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.pruning.schedule import LayerSignals
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Signals, View
from gridprune_cli.pruning.similarity import LazyCosines, cosines

HALF = 0.5
TILES = tuple(View(24, 24, (x, y, x + HALF, y + HALF)) for y in (0.0, HALF) for x in (0.0, HALF))
CASES = ((64, (View(24, 24),)), (320, (View(24, 24), *TILES)))
RUNS = 200
TABLE_RUNS, WARM_UP = 11, 2
FEATURE_WIDTH, EMBED_WIDTH, WORDS = 1024, 4096, 8  # widths of LLaVA-1.5-7B, and tokens of a question


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of one call, after a few to warm up."""
    times = []
    for _ in range(RUNS + 20):
        start = process_time()
        work()
        times.append((process_time() - start) * 1000)
    return median(times[20:])


def gridprune() -> None:
    method = make_method("gridprune")
    print(f"{'kept':>12}  {'no region':>10}  {'find region':>11}  {'region + select':>15}   ms")
    for k, views in CASES:
        count = sum(view.count for view in views)
        relevance, saliency, features = torch.rand(count) * 0.2, torch.rand(count), torch.randn(count, FEATURE_WIDTH)

        def plain(k: int = k, signals: tuple = (views, relevance, saliency, None, features)) -> None:
            method.select_batch([Signals(*signals)], [k])

        def find(relevance: torch.Tensor = relevance, views: tuple[View, ...] = views) -> None:
            contextual_region(relevance, views)

        def full(k: int = k, signals: tuple = (views, relevance, saliency, features)) -> None:
            views, relevance, saliency, features = signals
            region = contextual_region(relevance, views)
            method.select_batch([Signals(views, relevance, saliency, region, features)], [k])

        row = [milliseconds(work) for work in (plain, find, full)]
        print(f"{f'{k} of {count}':>12}  {row[0]:>10.2f}  {row[1]:>11.2f}  {row[2]:>15.2f}")


def methods() -> None:
    """Each method as a whole, and apart from its cosines, which are matrix products of the widths of the model."""
    for k, views in CASES:
        count = sum(view.count for view in views)
        vectors: dict[str, Any] = {
            "vision_features": torch.randn(count, FEATURE_WIDTH),
            "image_embeds": torch.randn(count, EMBED_WIDTH),
            "question_embeds": torch.randn(WORDS, EMBED_WIDTH),
        } | {name: torch.rand(count) for name in (*OPTIONAL_SIGNALS, "importance")}
        signals = Signals(views, torch.rand(count) * 0.2, torch.rand(count), None, **vectors)
        heading(k, count)
        for name in METHODS:
            if (method := make_method(name)).inner:
                continue
            split(name, type(method), partial(run_method, method, signals, k))


def run_method(method: Method, signals: Signals, k: int) -> None:
    method.merge(signals, *method.select_batch([signals], [k]))


def rules() -> None:
    """The same of the rules that choose inside the language model."""
    k, views = CASES[0]
    count = sum(view.count for view in views)
    keys, hidden_states = torch.randn(2, count, EMBED_WIDTH)
    text_keys, text_states = torch.randn(2, 50, EMBED_WIDTH)
    attention = torch.rand(count, dtype=torch.float64)
    within = torch.zeros(count, dtype=torch.bool)
    layer_signals = LayerSignals(
        torch.arange(count),
        within,
        views,
        attention,
        hidden_states,
        keys,
        text_states,
        text_keys,
        saliency=torch.rand(count),
        values=keys,
        text_values=text_keys,
        rotary=torch.rand(count, 2),
    )
    heading(k, count)
    for name, kind in RULES.items():
        split(name, kind, lambda kind=kind: kind().select(layer_signals, k))  # type: ignore[misc]


def heading(k: int, count: int) -> None:
    print(f"\n{f'{k} of {count}':>16}  {'cosines':>8}  {'the rest':>8}  {'all':>8}   ms")


def split(name: str, kind: type, work: Callable[[], object]) -> None:
    """Prints the times of some work of the module of `kind`, that of its cosines apart."""
    alike: list[float] = []
    everything: list[float] = []

    def timed(compute: Callable[..., Any]) -> Callable[..., Any]:
        def timed_compute(*arguments: Any) -> Any:
            start = process_time()
            result = compute(*arguments)
            alike[-1] += (process_time() - start) * 1000
            return result

        return timed_compute

    with (
        patch.object(sys.modules[kind.__module__], "cosines", timed(cosines), create=True),
        patch.object(LazyCosines, "__init__", timed(LazyCosines.__init__)),
        patch.object(LazyCosines, "of_tokens", timed(LazyCosines.of_tokens)),
    ):
        for _ in range(TABLE_RUNS + WARM_UP):
            alike.append(0.0)
            start = process_time()
            work()
            everything.append((process_time() - start) * 1000)
    rest = [whole - product for whole, product in zip(everything, alike, strict=True)]
    middles = (median(times[WARM_UP:]) for times in (alike, rest, everything))
    print(f"{name:>16}  " + "  ".join(f"{middle:>8.2f}" for middle in middles))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gridprune()
    methods()
    rules()


if __name__ == "__main__":
    main()
