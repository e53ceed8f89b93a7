"""`gridprune encode`: fills the cache."""

import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe
from gridprune_cli.cli.output import emit_json, progress, put, read_stdin, say, set_quiet, size, warn
from gridprune_cli.cli.values import in_shard

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.forecast import Forecast
    from gridprune_cli.runners.ray import Ray


@examples(
    "gridprune encode photos/",
    "find . -name '*.jpg' | gridprune encode -",
)
@options.takes(pipeline=options.pipeline, engine=options.encoding_engine)
def encode(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Image files, folders of them, or - for paths on stdin, one a line.",
            show_default=False,
        ),
    ],
    pipeline: "Pipeline",
    engine: "Ray | None",
    batch_size: Annotated[
        int,
        options.option("Images that go through the tower at once; halved if memory runs out.", options.WORK, min=1),
    ] = 16,
    with_prefix: Annotated[
        bool,
        options.option(
            "Also store what the language model's first layers, which are loaded for it, make of each image: relevance "
            "from attention needs it. Often several times the image's bytes; else the first question stores it.",
            options.WORK,
            "--with-prefix",
        ),
    ] = False,
    refresh: Annotated[bool, options.option("Encode again what is cached.", options.WORK, "--refresh")] = False,
    dry_run: Annotated[
        bool, options.option("Say what would be done; write nothing.", options.WORK, "--dry-run")
    ] = False,
    shard: options.Shard = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Encode images into the cache, but for those there already. One that can't be read is named; the rest goes on."""
    from gridprune_cli.errors import BadInput, GridpruneError
    from gridprune_cli.images import find_images
    from gridprune_cli.runners.forecast import forecast, may_lack_room

    set_quiet(quiet)
    if pipeline.store is None:
        raise BadInput("encode has nothing to do without a cache", field="no_cache")
    if paths.count("-") > 1:
        raise BadInput("stdin can be read once only", place="-")
    listed = [name for path in paths for name in (_names() if path == "-" else [path])]
    belongs = in_shard(shard)
    images = [image for image in find_images(listed) if belongs is None or belongs(str(image))]
    if dry_run:
        pipeline.store.writable = False
    if dry_run or may_lack_room(pipeline.encoder, pipeline.store, images, with_prefix=with_prefix):
        with progress("looking", len(images)) as step:
            expected = forecast(
                pipeline.encoder, pipeline.store, images, refresh=refresh, with_prefix=with_prefix, step=step
            )
        if dry_run:
            _print(expected, json)
        check_room(expected, pipeline.store.root, pipeline.encoder.cache_dtype)
    if dry_run:
        return
    done = hits = failed = size_of_new = 0
    noted: set[str] = set()  # a note that fits many images is printed once
    start = time.perf_counter()
    runner = pipeline.runner(images=batch_size)
    encode_all = partial(engine.encode, runner) if engine else partial(runner.encode, store=True)
    layers = f", and {pipeline.family.relevance_depth} layers of the language model" if with_prefix else ""
    with pipeline, progress(f"encoding{layers}", len(images)) as step:
        for name, result, hit in encode_all(images, refresh=refresh, with_prefix=with_prefix):
            if isinstance(result, GridpruneError):
                failed += 1
                warn(describe(result))
                line: dict[str, Any] = {"image": name, "error": describe(result)}
            else:
                for note in set(result.notes) - noted:
                    say(f"{name}: {note}")
                    noted.add(note)
                done, hits = done + 1, hits + hit
                size_of_new += 0 if hit else result.nbytes
                line = {"image": name, "key": result.key, "tokens": result.count, "cache": "hit" if hit else "miss"}
                line["notes"] = [f"{name}: {note}" for note in result.notes]
            if json:
                emit_json(line)
            step(1, f"{(done + failed) / (time.perf_counter() - start):.1f} images/s, {hits} hits")
    prefixes = " beside prefixes" if with_prefix else ""
    rate = done / (time.perf_counter() - start)
    say(f"{done} images, {hits} of them cached already, {size(size_of_new)} new{prefixes}, {rate:.1f} images/s")
    if failed:
        warn(f"{failed} of {len(images)} could not be encoded")
        raise typer.Exit(3)


def check_room(expected: "Forecast", root: Path, storage: str) -> None:
    """Raises GridpruneError where what is to be written would not fit."""
    from gridprune_cli.errors import GridpruneError

    smaller = ", or `cache_dtype=float8`" if storage == "full" else ""
    if expected.limit is not None and expected.total > expected.limit:
        raise GridpruneError(
            f"the images take about {size(expected.total)} in the cache, so the last would push out the first; set a "
            f"higher `cache_limit`, 0 for none{smaller}",
            field="cache_limit",
            value=size(expected.limit),
        )
    if expected.growth > expected.free:
        raise GridpruneError(
            f"about {size(expected.growth)} are needed, but {size(expected.free)} are free on its disk; make room, or "
            f"name another `cache_dir`{smaller}",
            place=str(root),
        )


def _print(expected: "Forecast", json: bool) -> None:
    if json:
        emit_json(asdict(expected))
        return
    cannot = f", {expected.unreadable} can't be encoded" if expected.unreadable else ""
    limit = "no limit" if expected.limit is None else f"limit {size(expected.limit)}"
    put(f"{expected.images} images, {expected.hits} of them cached already, {expected.encode} to encode{cannot}")
    put(f"about {size(expected.bytes)} to write; {limit}, {size(expected.free)} free on the disk")


def _names() -> list[str]:
    """The paths on stdin, a line each, whatever bytes their names are of."""
    return [os.fsdecode(line) for line in read_stdin("paths, one a line,").split(b"\n") if line.strip()]
