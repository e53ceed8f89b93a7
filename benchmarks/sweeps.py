"""The sweeps behind the defaults of GridPrune and of inner pruning: `python -m benchmarks.sweeps`.

They go through `gridprune eval`'s own code, on scenes that are neither trained on nor reported: what is chosen here is
judged by `gridprune eval scenes`.
"""

import argparse

from rich.console import Console
from rich.progress import track

from gridprune_cli.evaluation.data import scenes
from gridprune_cli.evaluation.results import markdown, summarise
from gridprune_cli.evaluation.run import Cell, Plan, Rows, answers
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.scenes.scene import TUNE
from gridprune_cli.settings import Pruning


def swept() -> tuple[Cell, ...]:
    """The settings among which the defaults were chosen, at 0.11; by budgets alone, where tokens are few, too."""
    cells = []
    for zone in (2, 4, 8):
        for temperature in (0.05, 0.1, 0.3, 1.0):
            for alpha in (0.0, 0.2, 0.5):
                method = make_method("gridprune", zone=zone, temperature=temperature, alpha=alpha, few="top")
                pruning = Pruning(method=method, region="none")
                cells.append(Cell(f"zone {zone}, T {temperature}, a {alpha}, no region", pruning))
    for share in (0.5, 0.65, 0.8, 0.9):
        for temperature in (0.1, 0.3, 1.0):
            for alpha in (0.0, 0.2, 0.5):
                method = make_method("gridprune", temperature=temperature, alpha=alpha, region_share=share)
                cells.append(Cell(f"T {temperature}, a {alpha}, region share {share}", Pruning(method=method)))
    return tuple(cells)


def inner(depth: int) -> tuple[Cell, ...]:
    """Pruning inside a language model of `depth` layers, at each layer at which tokens can leave."""
    cells = []
    for layer in range(1, depth):
        cells.append(Cell(f"region, layer {layer}", Pruning(keep=1.0, ilp="region", ilp_layer=layer)))
        for share in (0.33, 0.11, 0.05):
            for region in ("auto", "none"):
                pruning = Pruning(keep=1.0, region=region, ilp=share, ilp_layer=layer)
                cells.append(Cell(f"{share}, region {region}, layer {layer}", pruning))
    return tuple(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--cells", choices=("swept", "inner"), default="swept", help="before the model, or inside it")
    args = parser.parse_args()
    pipeline, console = Pipeline(args.model), Console(stderr=True)
    cells = swept() if args.cells == "swept" else inner(pipeline.family.depth)
    plan = Plan(scenes(args.questions, TUNE, "tune"), cells, batch=128)
    samples: Rows = {}
    steps = -(-args.questions // plan.batch) * len(plan.cells)
    asked = answers(pipeline, plan, samples)
    for _ in track(asked, "answering", steps, console=console, disable=not console.is_terminal):
        pass  # `answers` fills samples as it goes
    print(markdown(summarise(plan, samples)), end="")


if __name__ == "__main__":
    main()
