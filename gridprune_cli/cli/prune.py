"""`gridprune prune`: the pruned set of a question, for `generate` to answer from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.ask import Images, Question, read_inputs
from gridprune_cli.cli.output import check_target, emit_json, say, set_quiet, size

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline, Pruning


@options.takes(pipeline=options.pipeline, pruning=options.pruning, prompt=options.prompt)
def prune(
    images: Images,
    question: Question,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the pruned set.", show_default=False)],
    pipeline: "Pipeline",
    pruning: "Pruning",
    prompt: dict[str, Any],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Save the visual tokens that a question needs, with the prompt, as one safetensors file."""
    from gridprune_cli.files import write_atomic

    set_quiet(quiet)
    check_target(output, "--output")
    sources, asked = read_inputs(images, question)
    with pipeline:
        found = [pipeline.encode_one(source) for source in sources]
    pruned = pipeline.prune([image for image, _ in found], asked, pruning, **prompt)
    data = pruned.to_bytes()
    write_atomic(output, data, sync=True)
    if json:
        states = ["hit" if hit else "miss" for _, hit in found]
        cache = states[0] if len(states) == 1 else states
        emit_json(pruned.to_json() | {"cache": cache, "file": str(output), "bytes": len(data)})
    for note in [f"{image.name}: {note}" for image, _ in found for note in image.notes]:
        say(note)
    for note in pipeline.remarks(pruning):
        say(note)
    say(f"{output}: {pruned.counts}, {size(len(data))}")


prune.examples = (  # type: ignore[attr-defined]
    'Example: `gridprune prune street.png "Where is the star?" --keep 0.11 -o star.safetensors`'
)
