"""CLIP, attention and words as relevance, on the same questions: `python -m benchmarks.relevance -o run`.

Every method that looks at relevance, by each source that the embedded model has. It goes through the code of
`gridprune eval`, on the scenes that are reported; a stopped run goes on from there.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gridprune_cli.cli.evaluate import read_cells
from gridprune_cli.evaluation.data import open_data
from gridprune_cli.evaluation.results import summarise
from gridprune_cli.evaluation.run import Plan, fill, resume
from gridprune_cli.pipeline import Pipeline

SOURCES = {"clip": "CLIP", "attention": "attention", "both": "both", "words": "words"}
METHODS = (
    "gridprune, gridprune --literal, gridprune --ilp selection, gridprune --ilp selection --region none, "
    "topk-relevance, cdpruner --relevance-sign 1, trim --relevance-sign 1"
)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Per cent of what all tokens give, as Markdown, a column for each source.

    With the clustered standard error of the paired difference to all tokens.
    """
    lines = [
        f"| method | keep | {' | '.join(SOURCES[source] for source in results)} |",
        "|---|---:|" + "---:|" * len(results),
    ]
    by_source = [of_source["cells"] for of_source in results.values()]
    for cells in zip(*by_source, strict=True):
        figures = [f"{100 * cell['of_full']:.1f} ± {100 * cell['difference_error']:.1f}" for cell in cells]
        lines.append(f"| {cells[0]['name']} | {cells[0]['keep']:g} | {' | '.join(figures)} |")
    first = next(iter(results.values()))
    return "\n".join([*lines, "", f"{first['questions']} questions about {first['images']} images"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the answers, one for each source")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--keep", default="0.33,0.22,0.11,0.05,0.02")
    args = parser.parse_args()
    console, results = Console(stderr=True), {}
    for source in SOURCES:
        with Pipeline("scenes", relevance=source) as pipeline:
            plan = Plan(open_data(f"scenes:{args.questions}"), read_cells([args.methods], args.keep), batch=128)
            rows = resume(pipeline, plan, args.output / source)
            with Progress(console=console) as bar:
                task = bar.add_task(SOURCES[source], total=plan.count, completed=len(rows))
                fill(pipeline, plan, args.output / source, rows, partial(bar.advance, task))
            results[source] = plan.settings(pipeline) | summarise(plan, rows)
    print(table(results))


if __name__ == "__main__":
    main()
