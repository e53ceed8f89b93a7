"""`gridprune prune`: the pruned set of a question, for `generate` to answer from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.ask import Image, Question, read_question
from gridprune_cli.cli.output import check_target, emit_json, say, set_quiet, size

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline, Pruning


@options.takes(pipeline=options.pipeline, pruning=options.pruning)
def prune(
    image: Image,
    question: Question,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the pruned set.", show_default=False)],
    pipeline: "Pipeline",
    pruning: "Pruning",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Save the visual tokens that a question needs, with the prompt, as one safetensors file."""
    from gridprune_cli.files import write_atomic
    from gridprune_cli.images import read_source

    set_quiet(quiet)
    check_target(output, "--output")
    source, asked = read_source(image), read_question(question, image)
    with pipeline:
        encoded, hit = pipeline.encode_one(source)
    pruned = pipeline.prune(encoded, asked, pruning)
    data = pruned.to_bytes()
    write_atomic(output, data, sync=True)
    if json:
        emit_json(pruned.to_json() | {"cache": "hit" if hit else "miss", "file": str(output), "bytes": len(data)})
    for note in encoded.notes:
        say(f"{image}: {note}")
    say(f"{output}: {len(pruned.kept)} of {pruned.count} visual tokens, {size(len(data))}")


prune.examples = (  # type: ignore[attr-defined]
    'Example: `gridprune prune street.png "Where is the star?" --keep 0.11 -o star.safetensors`'
)
