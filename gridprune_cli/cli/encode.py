"""`gridprune encode`: fills the cache."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, progress, say, size, warn

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline


@options.takes(pipeline=options.pipeline)
def encode(
    paths: Annotated[
        list[str],
        typer.Argument(help="Image files, folders of them, or - for paths on stdin, one a line.", show_default=False),
    ],
    pipeline: "Pipeline",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the tower at once.")] = 16,
    refresh: Annotated[bool, typer.Option(help="Encode again what is cached already.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Encode images into the cache. What is there already is skipped; an unreadable image is named, the rest goes on."""
    from gridprune_cli.errors import BadInput, GridpruneError
    from gridprune_cli.images import find_images

    if pipeline.store is None:
        raise BadInput("--no-cache: encode has nothing to do without a cache")
    named = [line.rstrip("\n") for line in sys.stdin if line.strip()] if paths == ["-"] else paths
    images = find_images([Path(path) for path in named])
    done = hits = failed = written = 0
    start = time.perf_counter()
    with progress("encoding", len(images), quiet=quiet) as advance:
        for name, result, hit in pipeline.encode_all(images, batch=batch_size, refresh=refresh):
            if isinstance(result, GridpruneError):
                failed += 1
                warn(str(result))
                line = {"image": name, "error": str(result)}
            else:
                done, hits = done + 1, hits + hit
                line = {"image": name, "key": result.key, "tokens": result.count, "cache": "hit" if hit else "miss"}
            if json:
                emit_json(line)
            advance(1)
    seconds = time.perf_counter() - start
    written = pipeline.store.written
    if not quiet:
        rate = f"{done / seconds:.1f} images/s" if seconds else ""
        say(f"{done} images, {hits} of them cached already, {size(written)} written, {rate}")
    if failed:
        warn(f"{failed} of {len(images)} could not be encoded")
        raise typer.Exit(3)


encode.examples = (  # type: ignore[attr-defined]
    "Examples: `gridprune encode photos/`, `find . -name '*.jpg' | gridprune encode -`"
)
