"""`gridprune prune`: the pruned set of a question, for `generate` to answer from."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.batch import FailFast, Tally, report, work
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import error_fields
from gridprune_cli.cli.inputs import read_inputs
from gridprune_cli.cli.output import check_target, emit_json, progress, say, set_quiet, size, warn
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.local import Pruned
    from gridprune_cli.settings import Pruning, Request

_LONGEST = 243  # characters of a file's name before .safetensors; file systems take 255
_WINDOW = 128  # lines of --batch that are looked at together, to find those of one image


@examples(
    'gridprune prune street.png "Where is the star?" --keep 0.11 -o star.safetensors',
    "gridprune prune --batch questions.jsonl -o pruned/",
)
@options.takes(pipeline=options.pipeline, pruning=options.pruning, prompt=options.prompt)
def prune(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File for the pruned set; with --batch, the folder for them.", show_default=False
        ),
    ],
    pipeline: "Pipeline",
    pruning: "Pruning",
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
    from gridprune_cli.pipeline import cache_outcome
    from gridprune_cli.settings import Request

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
        request = Request(tuple(sources), text, pruning, **prompt)
        result = pipeline.runner().prune_one(request, with_prefix=with_prefix)
    pruned = result.pruned
    data = pruned.to_bytes()
    write_atomic(output, data, sync=True)
    if json:
        emit_json(pruned.to_json() | {"cache": cache_outcome(result.hits), "file": str(output), "bytes": len(data)})
    for note in pruned.notes:
        say(note)
    counts = f"{pruned.counts}, with the prefix" if pruned.prefix else pruned.counts
    say(f"{output}: {counts}, {size(len(data))}")


def prune_lines(
    file: str,
    folder: Path,
    pipeline: "Pipeline",
    pruning: "Pruning",
    prompt: dict[str, Any],
    with_prefix: bool,
    fail_fast: bool,
    shard: str | None,
    json: bool,
) -> None:
    """Writes a pruned set for every line. One that fails is named, and the rest goes on."""
    from gridprune_cli.builder import remarks
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.questions import Reader
    from gridprune_cli.runners.batches import in_order

    if not os.path.isdir(folder):
        raise BadInput("with --batch, a folder; make it first", field="output", value=folder)
    reader = Reader(file, in_shard=options.in_shard(shard))
    runner, tally = pipeline.runner(), Tally()
    written: set[Path] = set()

    def prune_requests(requests: Sequence["Request"]) -> "Iterator[Pruned | GridpruneError]":
        return in_order(runner.prune(requests, with_prefix=with_prefix))

    with pipeline, progress("pruning", reader.count()) as step:
        results = work(reader, pruning, prompt, prune_requests, _WINDOW, fail_fast)
        for item, result in results:
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
    for note in remarks(pipeline.family, pruning):
        say(note)
    say(tally.summary(0))
    if tally.failed:
        warn(f"{tally.failed} lines failed")
        raise typer.Exit(3)


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
