"""`gridprune show`: draws what pruning did."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options, remote
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.drawing import draw_figure, figure_text, is_colour
from gridprune_cli.cli.inputs import Question, read_inputs
from gridprune_cli.cli.output import check_target, put, say, set_quiet
from gridprune_cli.client.remote import RemotePipeline, RemotePruned, RemoteRequest

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.tokens import PrunedSet


@examples('gridprune show street.png "Where is the star?" --keep 0.11 -o star.png')
@options.takes(server=remote.server, pipeline=options.pipeline, pruning=options.pruning)
def show(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or - for stdin.", show_default=False)],
    question: Question,
    pipeline: "Pipeline | RemotePipeline",
    pruning: Any,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file. Without it, a coarse picture is printed.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw which tokens a question keeps and why: kept tokens, zones with their budgets, region, relevance."""
    set_quiet(quiet)
    check_target(output, "output")
    (source,), text = read_inputs([image], question)
    pruned: PrunedSet | RemotePruned
    with pipeline:
        if isinstance(pipeline, RemotePipeline):
            outputs = {"figure": "png" if output else "colour" if is_colour() else "plain", "with_prefix": False}
            pruned = pipeline.run(RemoteRequest((source,), text, pruning), outputs=outputs).pruned
        else:
            pruned = pipeline.prune(source, text, pruning, with_prefix=False)
    if output is None:
        put(figure_text(source, pruned))
    else:
        draw_figure(source, pruned, None, output)
    for note in pruned.notes:
        say(note)
    record = pruned.to_json()
    region, localizer = record["region"], record["localizer"]
    named = f", named by {localizer['name']}" if localizer and localizer.get("parsed") else ""
    say(f"{pruned.counts}, region {tuple(region) if region else 'none'}{named}")
