"""`gridprune show`: draws what pruning did."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.drawing import draw_figure, figure_of
from gridprune_cli.cli.inputs import Question, read_inputs
from gridprune_cli.cli.output import check_target, put, say, set_quiet, stdout

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning


@examples('gridprune show street.png "Where is the star?" --keep 0.11 -o star.png')
@options.takes(pipeline=options.pipeline, pruning=options.pruning)
def show(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or - for stdin.", show_default=False)],
    question: Question,
    pipeline: "Pipeline",
    pruning: "Pruning",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file. Without it, a coarse picture is printed.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw which tokens a question keeps and why: kept tokens, zones with their budgets, region, relevance."""
    from gridprune_cli.figure import coarse

    set_quiet(quiet)
    check_target(output, "output")
    (source,), text = read_inputs([image], question)
    with pipeline:
        pruned = pipeline.prune(source, text, pruning, with_prefix=False)
    if output is None:
        put(coarse(figure_of(source, pruned, None), colour=stdout().isatty() and not os.environ.get("NO_COLOR")))
    else:
        draw_figure(source, pruned, None, output)
    for note in pruned.notes:
        say(note)
    (origin,) = pruned.images
    named = f", named by {origin.localizer['name']}" if origin.localizer and origin.localizer.get("parsed") else ""
    say(f"{pruned.counts}, region {origin.region or 'none'}{named}")
