"""`gridprune prune`: the pruned set of a question, for `generate` to answer from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gridprune_cli.cli import options, remote
from gridprune_cli.cli.batch import FailFast, Tally, remarks_on, report, work
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import error_fields
from gridprune_cli.cli.inputs import read_inputs
from gridprune_cli.cli.output import check_target, emit_json, progress, say, set_quiet, size, warn
from gridprune_cli.cli.values import in_shard
from gridprune_cli.client.remote import RemoteAnswer, RemotePipeline, RemoteRequest
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.local import Pruned

_LONGEST = 243  # characters of a file's name before .safetensors; file systems take 255
_BATCH = 32  # questions that a server prunes for together
_WINDOW = 128  # lines of --batch that are looked at together, to find those of one image


@examples(
    'gridprune prune street.png "Where is the star?" --keep 0.11 -o star.safetensors',
    "gridprune prune --batch questions.jsonl -o pruned/",
)
@options.takes(server=remote.server, pipeline=options.pipeline, pruning=options.pruning, prompt=options.prompt)
def prune(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File for the pruned set; with --batch, the folder for them.", show_default=False
        ),
    ],
    pipeline: "Pipeline | RemotePipeline",
    pruning: Any,
    prompt: dict[str, Any],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files, or - for stdin.", show_default=False)
    ] = None,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question, or - for stdin.", show_default=False)
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Lines of questions, as of `batch`, or - for stdin: a file ID.safetensors each."
        ),
    ] = None,
    with_prefix: Annotated[
        bool,
        typer.Option(
            "--with-prefix",
            help="Save what the first layers make of the prompt up to its last image, in place of its image embeds.",
        ),
    ] = False,
    fail_fast: FailFast = False,
    shard: options.Shard = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Save the visual tokens that a question needs, with the prompt, as one safetensors file."""
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.questions import cache_outcome

    set_quiet(quiet)
    if batch is not None:
        if images or question:
            raise BadInput("images and questions come from its lines; leave the others out", field="batch")
        prune_lines(batch, output, pipeline, pruning, prompt, with_prefix, fail_fast, shard, json)
        return
    if fail_fast or shard:
        raise BadInput("only with --batch", field="fail_fast" if fail_fast else "shard")
    if not images or question is None:
        raise BadInput("name an image and a question, or --batch FILE; see `gridprune prune --help`")
    check_target(output, "output")
    sources, text = read_inputs(images, question)
    with pipeline:
        result: Pruned | RemoteAnswer
        if isinstance(pipeline, RemotePipeline):
            request = RemoteRequest(tuple(sources), text, pruning, **prompt)
            result = pipeline.run(request, outputs=_outputs(with_prefix))
        else:
            from gridprune_cli.settings import Request

            local_request = Request(tuple(sources), text, pruning, **prompt)
            result = pipeline.runner().prune_one(local_request, with_prefix=with_prefix)
    pruned = result.pruned
    data = pruned.to_bytes()
    write_atomic(output, data, sync=True)
    if json:
        emit_json(pruned.to_json() | {"cache": cache_outcome(result.hits), "file": str(output), "bytes": len(data)})
    for note in pruned.notes:
        say(note)
    counts = f"{pruned.counts}, with the prefix" if with_prefix else pruned.counts
    say(f"{output}: {counts}, {size(len(data))}")


def prune_lines(
    file: str,
    folder: Path,
    pipeline: "Pipeline | RemotePipeline",
    pruning: Any,
    prompt: dict[str, Any],
    with_prefix: bool,
    fail_fast: bool,
    shard: str | None,
    json: bool,
) -> None:
    """Writes a pruned set for every line. One that fails is named, and the rest goes on."""
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.questions import Reader

    if not os.path.isdir(folder):
        raise BadInput("with --batch, a folder; make it first", field="output", value=folder)
    reader = Reader(file, in_shard=in_shard(shard))
    tally, prune_all = Tally(), _pruner(pipeline, with_prefix)
    written: set[Path] = set()
    with pipeline, progress("pruning", reader.count()) as step:
        for item, result in work(reader, pruning, prompt, prune_all, _WINDOW, fail_fast):
            if not isinstance(result, GridpruneError):
                try:
                    path = _target(folder, item.id, written)
                except BadInput as fault:
                    report(item, fault, fail_fast)
                    result = fault
            if isinstance(result, GridpruneError):
                line = item.echo() | error_fields(result)
            else:
                data = result.pruned.to_bytes()
                write_atomic(path, data, sync=False)
                written.add(path)
                line = {"id": item.id} | result.pruned.to_json() | item.echo()
                line |= {"file": str(path), "bytes": len(data)}
            if json:
                emit_json(line)
            step(tally.count(result, reader.skipped), tally.status())
    for note in remarks_on(pipeline, pruning):
        say(note)
    say(tally.summary(0))
    if tally.failed:
        warn(f"{tally.failed} line{'s' * (tally.failed != 1)} failed")
        raise typer.Exit(3)


def _outputs(with_prefix: bool) -> dict[str, Any]:
    """What a server sends back beside the record: the file."""
    return {"file": True, "with_prefix": with_prefix}


def _pruner(pipeline: "Pipeline | RemotePipeline", with_prefix: bool) -> "Callable[[list[Any]], Iterator[Any]]":
    """Gives what comes of requests, in turn."""
    if isinstance(pipeline, RemotePipeline):
        outputs = _outputs(with_prefix)
        return lambda requests: pipeline.map(lambda one: pipeline.run(one, outputs=outputs), requests, _BATCH)
    from gridprune_cli.runners.batches import in_order

    runner = pipeline.runner()
    return lambda requests: in_order(runner.prune(requests, with_prefix=with_prefix))


def _target(folder: Path, ident: Any, written: set[Path]) -> Path:
    """The file of a line; none is hidden, so that `*.safetensors` finds it. Raises BadInput where it can't be so."""
    name = quote(str(ident), safe="", errors="surrogatepass")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if not 0 < len(name) <= _LONGEST:
        raise BadInput(f"id takes {len(name)} characters in a file's name; give it one that takes 1 to {_LONGEST}")
    path = folder / f"{name}.safetensors"
    if path in written:
        raise BadInput("two lines have this id; give each its own", place=str(path))
    return path
