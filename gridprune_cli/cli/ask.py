"""`gridprune ask`: a question about an image, answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, say, set_quiet

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline, Pruning

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or - for stdin.", show_default=False)]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question.", show_default=False)]


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
    from gridprune_cli.cli.show import draw_figure, scene_notice
    from gridprune_cli.files import write_atomic
    from gridprune_cli.images import read_source

    set_quiet(quiet)
    source = read_source(image)
    with pipeline:
        answer = pipeline.ask(source, question, pruning, max_new_tokens=max_new_tokens)
    if save:
        write_atomic(save, answer.pruned.to_bytes(), sync=True)
    if show:
        draw_figure(source, answer.pruned, answer.text, show)
    if json:
        emit_json(answer.to_json())
    else:
        print(answer.text)
    scene_notice(pipeline.model, source)
    kept, full = len(answer.pruned.kept), answer.pruned.count
    found = "cached" if answer.hit else "encoded"
    say(f"{kept} of {full} visual tokens, image {found}, {answer.ms['total'] / 1e3:.2f} s")


ask.examples = (  # type: ignore[attr-defined]
    'Examples: `gridprune ask street.png "What is left of the red circle?" --keep 0.11`, '
    '`gridprune ask - "How many stars are there?" --json < street.png`'
)
