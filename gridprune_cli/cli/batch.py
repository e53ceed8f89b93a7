"""`gridprune batch`: many questions, a line of JSON each, answered."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options, remote
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe, error_fields
from gridprune_cli.cli.output import check_target, lines_to, progress, say, set_quiet, warn
from gridprune_cli.cli.values import in_shard
from gridprune_cli.client.remote import RemoteAnswer, RemotePipeline, RemoteRequest
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.integrations.vllm_http import Vllm
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.questions import Item, Reader
    from gridprune_cli.runners.local import Pruned, Reply
    from gridprune_cli.runners.ray import Ray
    from gridprune_cli.settings import Request

WINDOW = 16  # batches of questions that are looked at together, to find those of one image and of like length

FailFast = Annotated[bool, options.option("End at the first line that fails.", options.WORK, "--fail-fast")]
BatchSize = Annotated[
    int, options.option("Questions that are answered at once; halved if memory runs out.", options.WORK, min=1)
]


@examples(
    "gridprune batch questions.jsonl -o answers.jsonl",
    "gridprune batch questions.jsonl --resume answers.jsonl",
    "jq -c ... | gridprune batch - | jq -r .answer",
    "gridprune batch questions.jsonl --engine vllm --server http://localhost:8000 --positions compact",
)
@options.takes(
    server=remote.server,
    pipeline=options.pipeline,
    engine=options.engine,
    pruning=options.pruning,
    prompt=options.prompt,
    generation=options.generation,
)
def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='Lines as {"image": "a.png", "question": "..."}, with id and keep where wanted; - for stdin.',
            show_default=False,
        ),
    ],
    pipeline: "Pipeline | RemotePipeline",
    engine: "Ray | Vllm | None",
    pruning: Any,
    prompt: dict[str, Any],
    generation: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the results.", show_default="stdout")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a file of results: skip what is in it, and write the rest behind.")
    ] = None,
    fail_fast: FailFast = False,
    shard: options.Shard = None,
    batch_size: BatchSize = 32,
    quiet: options.Quiet = False,
) -> None:
    """Answer many questions, a line of JSON each; results come as lines in the same order.

    A line that fails gives a line with `error` and `error_type`, and the rest goes on.
    """
    from gridprune_cli.questions import Done, Reader

    set_quiet(quiet)
    check_results(output, resume, file)
    if engine:
        from gridprune_cli.integrations.vllm_http import Vllm, check_pruning

        if isinstance(engine, Vllm):
            check_pruning(pruning)  # with a share of its own, a line fails alone
    done = Done(resume) if resume else None
    reader = Reader(file, done=done, in_shard=in_shard(shard))
    tally = Tally()
    runner = None if isinstance(pipeline, RemotePipeline) else pipeline.runner(questions=batch_size)

    def answers(requests: list[Any]) -> "Iterator[Reply | RemoteAnswer | GridpruneError]":
        if isinstance(pipeline, RemotePipeline):
            return pipeline.map(lambda request: pipeline.run(request, generation), requests, batch_size)
        assert runner is not None
        if engine:
            return engine.answer(runner, requests, **generation)
        return runner.answer(requests, **generation)

    try:
        with pipeline, lines_to(resume or output) as write, progress("answering", reader.count()) as step:
            most = None if engine and engine.starts_once else WINDOW * batch_size
            for item, result in work(reader, pruning, prompt, answers, most, fail_fast):
                write(line(item, result))
                step(tally.count(result, reader.skipped), tally.status())
    except KeyboardInterrupt:
        where = f"--resume {resume or output}" if resume or output else "--resume FILE, with what was printed in FILE"
        say(f"interrupted after {tally.done} lines; to go on, give the same command with {where}")
        raise
    for note in remarks_on(pipeline, pruning):
        say(note)
    say(tally.summary(reader.skipped))
    if failed := tally.failed + (done.failed if done else 0):
        warn(f"{failed} line{'s' * (failed != 1)} failed; they have an `error` in the results")
        raise typer.Exit(3)


def remarks_on(pipeline: "Pipeline | RemotePipeline", pruning: Any) -> Sequence[str]:
    """What a user should know of how the model prunes, once it has."""
    if isinstance(pipeline, RemotePipeline):
        return pipeline.remarks
    from gridprune_cli.builder import remarks

    return remarks(pipeline.family, pruning)


def check_results(output: Path | None, resume: Path | None, file: str) -> None:
    """Raises BadInput where results can't go to where they are to go, before any work is done for them."""
    if output and resume and output != resume:
        raise BadInput(f"is where results go, so leave --output {output} out", field="resume", value=resume)
    check_target(resume or output, "resume" if resume else "output")
    target = resume or output
    if target and file != "-" and target.exists() and os.path.exists(file) and os.path.samefile(target, file):
        raise BadInput("holds the questions; name another file for the results", place=str(target))
    if output and not resume and output.is_file() and output.stat().st_size:
        reason = f"has something in it; go on with it as --resume {output}, or remove it"
        raise BadInput(reason, field="output", value=output)


def request_of(
    images: tuple[str, ...], item: "Item", pruning: Any, prompt: dict[str, Any]
) -> "Request | RemoteRequest":
    """What a line asks for. `pruning` is that of the command, as options by name where a server does the work."""
    if isinstance(pruning, dict):
        kept = {} if item.keep is None else {"keep": item.keep, "tokens": None}
        return RemoteRequest(images, item.question, pruning | kept, **prompt)
    from gridprune_cli.settings import Request

    kept_here = pruning if item.keep is None else replace(pruning, keep=item.keep, tokens=None)
    return Request(images, item.question, kept_here, **prompt)


def work(
    reader: "Reader", pruning: Any, prompt: dict[str, Any], results: Any, most: int | None, fail_fast: bool
) -> "Iterator[tuple[Item, Any]]":
    """Every line and what came of it, in turn. `results` makes the results of questions, in turn, as a generator.

    It is given `most` lines at a time, of those that are there; None: all of them at once.
    """
    from gridprune_cli.questions import windows

    noted: set[str] = set()  # a note that fits many images is printed once
    for window in windows(reader, most, lambda item: item.size) if most else [list(reader)]:
        requests = [
            request_of(tuple(reader.place(image) for image in item.images), item, pruning, prompt)
            for item in window
            if item.fault is None
        ]
        with closing(results(requests)) as outcomes:  # so that the rest is not worked on where a line is the last
            for item in window:
                result = next(outcomes) if item.fault is None else BadInput(item.fault)
                if isinstance(result, GridpruneError):
                    report(item, result, fail_fast)
                else:
                    for name, note in result.image_notes:
                        if note not in noted:
                            say(f"{name}: {note}")
                            noted.add(note)
                yield item, result


def report(item: "Item", error: GridpruneError, fail_fast: bool) -> None:
    """Prints which line failed, and how. Raises it instead where that is the end."""
    placed = error if item.fault else error.at(item.place)
    if fail_fast:
        raise placed from error
    warn(describe(placed))


def line(item: "Item", result: "Reply | RemoteAnswer | GridpruneError") -> dict[str, Any]:
    """The line of a result. It says nothing of when and how fast it was made: made again, it is the same."""
    extra = {"extra": item.extra} if item.extra else {}
    if isinstance(result, GridpruneError):
        return item.echo() | error_fields(result) | extra
    return {"id": item.id} | result.record | item.echo() | {"answer": result.text} | extra


class Tally:
    """Counts results, and says how it is going."""

    def __init__(self) -> None:
        self.done = self.failed = self.hits = self._skipped = 0
        self._start = time.perf_counter()

    def count(self, result: "Reply | Pruned | RemoteAnswer | GridpruneError", skipped: int) -> int:
        """How many lines are behind us with this result: itself, and those that were skipped before it."""
        self.done += 1
        if isinstance(result, GridpruneError):
            self.failed += 1
        else:
            self.hits += result.hit
        steps = 1 + skipped - self._skipped
        self._skipped = skipped
        return steps

    def status(self) -> str:
        seconds = time.perf_counter() - self._start
        encoded = self.done - self.failed - self.hits
        return f"{self.done / seconds:.1f} questions/s, {encoded / seconds:.1f} images/s, {self.hits} hits"

    def summary(self, skipped: int) -> str:
        before = f", {skipped} done before" if skipped else ""
        return f"{self.done} questions{before}, {self.hits} of images encoded already, {self.status().split(',')[0]}"
