"""`gridprune ask`: a question about an image, answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cache.files import write_atomic
from gridprune_cli.cli import options, remote
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.drawing import draw_figure
from gridprune_cli.cli.inputs import Images, Question, read_inputs
from gridprune_cli.cli.output import check_target, emit_json, emit_text, say, set_quiet, stdout
from gridprune_cli.client.remote import RemoteAnswer, RemotePipeline
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Answer, Pipeline


@examples(
    'gridprune ask street.png "What is left of the red circle?" --keep 0.11',
    'gridprune ask before.png after.png "What changed?" --model OpenGVLab/InternVL3-8B-hf',
    'gridprune ask - "How many stars are there?" --json < street.png',
)
@options.takes(
    server=remote.server,
    pipeline=options.pipeline,
    pruning=options.pruning,
    prompt=options.prompt,
    generation=options.generation,
    hidden=options.RARE,
)
def ask(
    images: Images,
    question: Question,
    pipeline: "Pipeline | RemotePipeline",
    pruning: Any,
    prompt: dict[str, Any],
    generation: dict[str, Any],
    save: Annotated[Path | None, typer.Option(help="Also save the pruned set, as safetensors.")] = None,
    show: Annotated[Path | None, typer.Option(help="Also draw what was kept, as PNG.")] = None,
    stream: options.Stream = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question about images from the visual tokens that it needs.

    More options, taken here too: `gridprune batch --help`, `--stream/--no-stream`.
    """
    set_quiet(quiet)
    check_target(save, "save")
    check_target(show, "show")
    if show and len(images) > 1:
        raise BadInput("draws one image, not several; ask about each", field="show")
    sources, text = read_inputs(images, question)
    beams = generation.get("num_beams") not in (None, 1)  # of which none is the answer before the end
    flows = not json and (stdout().isatty() and not beams if stream is None else stream)
    written = stdout() if flows else None
    with pipeline:
        settings = prompt | generation | {"stream": written}
        if isinstance(pipeline, RemotePipeline):
            settings["outputs"] = {"file": save is not None, "figure": "png" if show else None}
        answer: Answer | RemoteAnswer = pipeline.ask(sources, text, pruning, **settings)
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
    came = "cached" if answer.hit else "encoded"
    say(f"{answer.pruned.counts}, image {came}, {answer.ms['total'] / 1e3:.2f} s")
