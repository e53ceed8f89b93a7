"""`gridprune ask`: a question about an image, answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import check_target, emit_json, emit_text, read_stdin, say, set_quiet, stdout
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.images import Source
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files, or - for stdin.", show_default=False)
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question, or - for stdin.", show_default=False)]


@options.takes(pipeline=options.pipeline, pruning=options.pruning, prompt=options.prompt, generation=options.generation)
def ask(
    images: Images,
    question: Question,
    pipeline: "Pipeline",
    pruning: "Pruning",
    prompt: dict[str, Any],
    generation: dict[str, Any],
    max_new_tokens: options.MaxNewTokens = 128,
    save: Annotated[Path | None, typer.Option(help="Also save the pruned set, as safetensors.")] = None,
    show: Annotated[Path | None, typer.Option(help="Also draw what was kept, as PNG.")] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the answer as it comes.", show_default="at a terminal"),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question about an image, or several, from the visual tokens that it needs."""
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.cli.show import draw_figure

    set_quiet(quiet)
    check_target(save, "--save")
    check_target(show, "--show")
    if show and len(images) > 1:
        raise BadInput("--show: draws one image, not several; ask about each")
    sources, asked = read_inputs(images, question)
    beams = generation.get("num_beams") not in (None, 1)  # of which none is the answer before the end
    flows = not json and (stdout().isatty() and not beams if stream is None else stream)
    written = stdout() if flows else None
    with pipeline:
        answer = pipeline.ask(
            sources,
            asked,
            pruning,
            **prompt,
            max_new_tokens=max_new_tokens,
            stream=written,
            **generation,
        )
    if json:
        emit_json(answer.to_json())
    elif not flows:
        emit_text(answer.text)
    if save:
        write_atomic(save, answer.pruned.to_bytes(), sync=True)
    if show:
        draw_figure(sources[0], answer.pruned, answer.text, show)
    for note in answer.notes:
        say(note)
    found = "cached" if answer.hit else "encoded"
    say(f"{answer.pruned.counts}, image {found}, {answer.ms['total'] / 1e3:.2f} s")


def read_inputs(images: list[str], question: str) -> tuple[list["Source"], str]:
    """Images and question, `-` read from stdin. Raises BadInput where more than one of them is to come from there."""
    from gridprune_cli.images import read_source

    if [*images, question].count("-") > 1:
        raise BadInput("-: only one of images and question can come from stdin")
    asked = read_stdin("the question").decode("utf-8", "replace").strip() if question == "-" else question
    return [read_source(image) for image in images], asked


ask.examples = (  # type: ignore[attr-defined]
    'Examples: `gridprune ask street.png "What is left of the red circle?" --keep 0.11`, '
    '`gridprune ask - "How many stars are there?" --json < street.png`'
)
