"""`gridprune show`: draws what pruning did."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.ask import Question, read_inputs
from gridprune_cli.cli.output import check_target, put, say, set_quiet, stdout

if TYPE_CHECKING:
    from gridprune_cli.figure import Figure
    from gridprune_cli.images import Source
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning
    from gridprune_cli.tokens import Origin, PrunedSet


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
    check_target(output, "--output")
    (source,), asked = read_inputs([image], question)
    with pipeline:
        pruned = pipeline.prune(source, asked, pruning)
    if output is None:
        put(coarse(figure_of(source, pruned, None), colour=stdout().isatty() and not os.environ.get("NO_COLOR")))
    else:
        draw_figure(source, pruned, None, output)
    for note in pruned.notes:
        say(note)
    (origin,) = pruned.images
    named = f", named by {origin.localizer['name']}" if origin.localizer and origin.localizer.get("parsed") else ""
    say(f"{pruned.counts}, region {origin.region or 'none'}{named}")


show.examples = (  # type: ignore[attr-defined]
    'Example: `gridprune show street.png "Where is the star?" --keep 0.11 -o star.png`'
)


def draw_figure(source: "Source", pruned: "PrunedSet", answer: str | None, path: Path) -> None:
    """Writes the figure of a pruned set as PNG."""
    import io

    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.figure import draw

    png = io.BytesIO()
    draw(figure_of(source, pruned, answer)).save(png, "PNG")
    write_atomic(path, png.getvalue(), sync=True)


def figure_of(source: "Source", pruned: "PrunedSet", answer: str | None) -> "Figure":
    """What there is to draw of a pruned set."""
    from gridprune_cli.figure import Figure
    from gridprune_cli.images import load_image

    (origin,) = pruned.images
    kept = f"{len(pruned.kept)} of {pruned.count} tokens"
    compressed = "" if pruned.plc == "off" else f"plc {pruned.plc}"
    return Figure(
        image=load_image(source).image,
        views=origin.views,
        kept=pruned.kept.tolist(),
        relevance=None if pruned.relevance is None else pruned.relevance.tolist(),
        zones=_budgets(origin, pruned.method.get("zone", 1)),
        region=origin.region,
        question=pruned.question,
        answer=answer,
        details=" · ".join(filter(None, (kept, pruned.method["name"], compressed, str(pruned.schedule or "")))),
    )


def _budgets(origin: "Origin", zone: int) -> list[tuple[int, int, int, int, int, int]]:
    """Every zone's rectangle with its budget."""
    from gridprune_cli.pruning.zones import zone_index

    if origin.zones is None:
        return []
    _, zones = zone_index(origin.views, zone)
    return [(*rectangle, n) for rectangle, n in zip(zones.rectangles(), origin.zones["budgets"], strict=True)]
