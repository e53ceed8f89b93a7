"""`gridprune ask`: a question about an image, answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import check_target, emit_json, read_stdin, say, set_quiet
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline, Pruning

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or - for stdin.", show_default=False)]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question, or - for stdin.", show_default=False)]


@options.takes(pipeline=options.pipeline, pruning=options.pruning)
def ask(
    image: Image,
    question: Question,
    pipeline: "Pipeline",
    pruning: "Pruning",
    max_new_tokens: options.MaxNewTokens = 128,
    save: Annotated[Path | None, typer.Option(help="Also save the pruned set, as safetensors.")] = None,
    show: Annotated[Path | None, typer.Option(help="Also draw what was kept, as PNG.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question about an image from the visual tokens that it needs."""
    from gridprune_cli.cli.show import draw_figure
    from gridprune_cli.files import write_atomic
    from gridprune_cli.images import read_source

    set_quiet(quiet)
    check_target(save, "--save")
    check_target(show, "--show")
    source, asked = read_source(image), read_question(question, image)
    with pipeline:
        answer = pipeline.ask(source, asked, pruning, max_new_tokens=max_new_tokens)
    if json:
        emit_json(answer.to_json())
    else:
        print(answer.text, flush=True)
    if save:
        write_atomic(save, answer.pruned.to_bytes(), sync=True)
    if show:
        draw_figure(source, answer.pruned, answer.text, show)
    for note in answer.notes:
        say(f"{image}: {note}")
    kept, full = len(answer.pruned.kept), answer.pruned.count
    found = "cached" if answer.hit else "encoded"
    say(f"{kept} of {full} visual tokens, image {found}, {answer.ms['total'] / 1e3:.2f} s")


def read_question(question: str, image: str) -> str:
    """The question, or for `-` what stdin says. Raises BadInput where both are to come from there."""
    if question != "-":
        return question
    if image == "-":
        raise BadInput("-: image and question can't both come from stdin")
    return read_stdin("the question").decode("utf-8", "replace").strip()


ask.examples = (  # type: ignore[attr-defined]
    'Examples: `gridprune ask street.png "What is left of the red circle?" --keep 0.11`, '
    '`gridprune ask - "How many stars are there?" --json < street.png`'
)
