"""`gridprune generate`: answers from pruned sets, without image, cache or vision tower."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cache.files import MAX_BYTES, FileFault, read_bytes, read_header
from gridprune_cli.cli import options, remote
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe, error_fields
from gridprune_cli.cli.output import emit_json, emit_text, open_stdin, progress, say, set_quiet, warn
from gridprune_cli.client.remote import RemoteAnswer, RemotePipeline
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.runners.local import Runner
    from gridprune_cli.tokens import PrunedSet

Result = tuple[dict[str, Any], str] | GridpruneError
"""The record and the answer of a pruned set, or why there is none."""

WINDOW = 128  # files that are held together, to find those of like length


@examples(
    "gridprune generate star.safetensors",
    "gridprune generate pruned/*.safetensors --json",
)
@options.takes(server=remote.server, generation=options.generation)
def generate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Pruned sets, as `prune` writes them, or - for one on stdin.", show_default=False
        ),
    ],
    server: RemotePipeline | None,
    generation: dict[str, Any],
    model: Annotated[
        str | None,
        options.option(
            "Model to answer with, where it lies elsewhere than when the set was made.",
            options.MODEL,
            show_default="the one that made the set",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    batch_size: Annotated[
        int, options.option("Sets that are answered at once; halved if memory runs out.", options.WORK, min=1)
    ] = 32,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer from pruned sets, in the order given. Needs neither the images nor the vision tower.

    Of several files, one that can't be answered from is named, and the rest goes on.
    """
    set_quiet(quiet)
    if files.count(Path("-")) > 1:
        raise BadInput("stdin can be read once only", place="-")
    if server and not server.named and not all(_is_for(server, path) for path in files):
        say("working without the server that was found: it has another model")
        server = None
    if server is None:
        answers_of = _local_answers(model, batch_size, generation, device=device, dtype=dtype, quantize=quantize)
    else:
        answers_of = _remote_answers(server, batch_size, generation)
    failed = 0
    with server or nullcontext(), progress("answering", len(files)) as step:
        for window in _windows(files):
            for path, result in zip(window, answers_of(window), strict=True):
                if isinstance(result, GridpruneError):
                    if len(files) == 1:
                        raise result
                    failed += 1
                    error = result.about(str(path))
                    warn(describe(error))
                    if json:
                        emit_json({"file": str(path)} | error_fields(error))
                elif json:
                    emit_json(result[0] | {"file": str(path), "answer": result[1]})
                else:
                    emit_text(result[1])
                step()
    if failed:
        warn(f"{failed} of {len(files)} could not be answered from")
        raise typer.Exit(3)


def _windows(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Files to be held together: up to `WINDOW`, and no more bytes than the largest one may have."""
    window: list[Path] = []
    held = 0
    for path in paths:
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        if window and (len(window) == WINDOW or held + size > MAX_BYTES):
            yield window
            window, held = [], 0
        window.append(path)
        held += size
    yield window


def _is_for(server: RemotePipeline, path: Path) -> bool:
    """Whether a server has the model of a pruned set. What is no set it tells as well as anybody."""
    try:
        return str(path) == "-" or read_header(path).get("fingerprint") == server.fingerprint
    except (OSError, FileFault):
        return True


def _local_answers(
    model: str | None, batch_size: int, generation: dict[str, Any], **settings: Any
) -> Callable[[Sequence[Path]], Iterator[Result]]:
    """Answers from files, with models of this process: those of the sets, or the one that is named.

    `settings` are those of `Pipeline`: where the model runs, in which dtype, and how its weights are held.
    """
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.batches import in_order

    runners: dict[str, Runner] = {}

    def runner_of(name: str) -> "Runner":
        if name not in runners:
            runners[name] = Pipeline(name, **settings).runner(questions=batch_size)
        return runners[name]

    def answer(paths: Sequence[Path]) -> Iterator[Result]:
        sets = [_load(path) for path in paths]
        answers = in_order(_answers(sets, model, runner_of, generation))
        for pruned, text in zip(sets, answers, strict=True):
            if isinstance(text, GridpruneError):
                yield text
            elif not isinstance(pruned, GridpruneError):
                yield pruned.to_json(), text

    return answer


def _remote_answers(
    server: RemotePipeline, batch_size: int, generation: dict[str, Any]
) -> Callable[[Sequence[Path]], Iterator[Result]]:
    """Answers from files, by a server."""

    def answer_one(path: Path) -> RemoteAnswer:
        return server.generate(str(path), _read(path), generation)

    def answer(paths: Sequence[Path]) -> Iterator[Result]:
        for result in server.map(answer_one, paths, batch_size):
            yield result if isinstance(result, GridpruneError) else (result.record, result.text)

    return answer


def _answers(
    sets: "Sequence[PrunedSet | GridpruneError]",
    model: str | None,
    runner_of: "Callable[[str], Runner]",
    generation: dict[str, Any],
) -> "Iterator[tuple[int, str | GridpruneError]]":
    """Index and answer of every set, model by model. A set that could not be read is its own answer."""
    groups: dict[str, list[tuple[int, PrunedSet]]] = {}
    for index, pruned in enumerate(sets):
        if isinstance(pruned, GridpruneError):
            yield index, pruned
        else:
            groups.setdefault(model or pruned.model, []).append((index, pruned))
    for name, group in groups.items():
        try:
            answers = runner_of(name).generate([pruned for _, pruned in group], **generation)
            for place, answer in answers:
                yield group[place][0], answer if isinstance(answer, GridpruneError) else answer.text
        except GridpruneError as fault:  # the model can't be opened or loaded
            for index, _ in group:
                yield index, fault


def _read(path: Path) -> bytes:
    """The file of a pruned set, whose bytes the server looks at. Raises BadInput where it can't be read."""
    try:
        return open_stdin("a pruned set").read(MAX_BYTES + 1) if str(path) == "-" else read_bytes(path, MAX_BYTES)
    except FileFault as fault:
        raise BadInput(f"not a pruned set ({fault}); make one with `gridprune prune`", place=str(path)) from fault
    except OSError as fault:
        raise BadInput(f"can't be read ({fault.strerror}); check the path", place=str(path)) from fault


def _load(path: Path) -> "PrunedSet | GridpruneError":
    from gridprune_cli.tokens import load_pruned, read_pruned

    try:
        return read_pruned(open_stdin("a pruned set"), "-") if str(path) == "-" else load_pruned(path)
    except GridpruneError as fault:
        return fault
