"""`gridprune export`: pruned sets for a serving engine, as files or sent to it."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli import choices
from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe, error_fields
from gridprune_cli.cli.output import emit_json, emit_text, progress, say, set_quiet, size, warn
from gridprune_cli.cli.remote import check_key, ignore_broken_pipes
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.integrations.vllm_http import VllmAnswer
    from gridprune_cli.tokens import PrunedSet
    from gridprune_cli.vlm.family import Family


_MAX_NEW_TOKENS, _BATCH_SIZE = 128, 32  # unless an option says otherwise


@examples(
    'gridprune prune photo.jpg "What is it?" --tokens 64 --positions compact -o it.safetensors',
    "gridprune export it.safetensors --to vllm -o requests/",
    "gridprune export it.safetensors --to vllm --serve http://localhost:8000",
    'gridprune prune photo.jpg "What is it?" --keep 1.0 -o whole.safetensors',
    "gridprune export whole.safetensors --to vllm-ec -o encodings/",
)
def export(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="PRUNED...", help="Pruned sets, as `prune` writes them.", show_default=False),
    ],
    to: Annotated[choices.ExportFormat, typer.Option(help="The engine.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder, which must exist, for the files: NAME.vllm.safetensors, NAME.sglang.safetensors, or "
            "UUID/encoder_cache.safetensors for vllm-ec.",
            show_default=False,
        ),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Running engine, http://HOST:PORT, which is sent the sets, and whose answers are printed.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that the sets are for, where it lies elsewhere than when they were made.",
            show_default="the one that made the set",
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = _MAX_NEW_TOKENS,
    batch_size: Annotated[
        int, options.option("With --serve: sets that are under way at once.", options.WORK, min=1)
    ] = _BATCH_SIZE,
    api_key: Annotated[
        str | None, options.option("With --serve: what the engine asks for.", options.SERVER, metavar="KEY")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write pruned sets in the form that a serving engine takes: image embeds in place of the image, and the prompt.

    Or send them to a running vLLM, and print its answers as `generate` does. vllm: LLaVA-1.5, LLaVA-NeXT,
    LLaVA-OneVision, InternVL and Qwen-VL, pruned with --positions compact. sglang: Qwen-VL, with either positions.
    vllm-ec: whole images, of sets pruned with --keep 1.0, for vLLM's encoder cache. Of several sets, one that can't be
    exported is named, and the rest goes on.
    """
    set_quiet(quiet)
    if (output is None) == (serve is None):
        raise BadInput("give --output for files, or --serve to have a running engine answer; one of them")
    if serve is not None:
        if to != "vllm":
            raise BadInput("only `to=vllm` can be sent; write files with `output`", field="serve", value=serve)
        check_key(api_key)
        ignore_broken_pipes()
        _serve(files, serve, api_key, model, max_new_tokens, batch_size, json)
    else:
        assert output is not None
        sent_only = {
            "max_new_tokens": max_new_tokens != _MAX_NEW_TOKENS
            and str(max_new_tokens) != os.environ.get("GRIDPRUNE_MAX_NEW_TOKENS"),
            "batch_size": batch_size != _BATCH_SIZE,
            "api_key": api_key is not None,
        }
        if setting := next((name for name, changed in sent_only.items() if changed), None):
            raise BadInput("only with --serve, where sets are sent and answered", field=setting)
        _write(files, output, to, model, json)


class Reporter:
    """Says which of the sets failed, and at the end how many."""

    def __init__(self, files: Sequence[Path], json: bool, verb: str):
        self._count, self._json, self._verb = len(files), json, verb
        self._failed = 0

    def fail(self, path: Path, fault: GridpruneError) -> None:
        """Raises the failure of the only set there is."""
        error = fault.about(str(path))
        if self._count == 1:
            raise error from fault
        self._failed += 1
        warn(describe(error))
        if self._json:
            emit_json({"pruned": str(path)} | error_fields(error))

    def end(self) -> None:
        if self._failed:
            warn(f"{self._failed} of {self._count} could not be {self._verb}")
            raise typer.Exit(3)


def _write(files: Sequence[Path], output: Path, to: choices.ExportFormat, model: str | None, json: bool) -> None:
    """Writes a file for each set."""
    if not os.path.isdir(output):
        raise BadInput("no folder; make it first", field="output", value=output)
    stems = Counter(path.stem for path in files)
    for path in files:
        if stems[path.stem] > 1 and to != "vllm-ec":
            reason = "another set has this name too, and one folder can't hold both; export it apart"
            raise BadInput(reason, place=str(path))
    families: dict[str, Family] = {}
    reporter = Reporter(files, json, "exported")
    lengths: set[int] = set()  # how many image embeds each image has, of sets where vLLM wants equally many
    for path in files:
        try:
            line, about, length = _export(path, output, to, model, families)
        except GridpruneError as fault:
            reporter.fail(path, fault)
            continue
        if length is not None:
            lengths.add(length)
        if json:
            emit_json(line)
        say(f"{line['file']}: {about}, {size(line['bytes'])}")
    if len(lengths) > 1:
        warn(
            f"these sets have from {min(lengths)} to {max(lengths)} image embeds for an image, and vLLM takes only "
            "equal ones at once; docs/vllm.md says what to do"
        )
    reporter.end()


def _export(
    path: Path, output: Path, to: choices.ExportFormat, model: str | None, families: "dict[str, Family]"
) -> tuple[dict[str, Any], str, int | None]:
    """Writes one set into a folder. `families` holds the models that were opened.

    Returns the line of JSON, what the file holds in words, and how many image embeds vLLM wants of every other image
    too, where it wants equally many.
    """
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.integrations.sglang import to_sglang
    from gridprune_cli.integrations.vllm import to_vllm
    from gridprune_cli.integrations.vllm_ec import FILE, to_encoder_cache

    pruned, family = _open(path, model, families)
    length = None  # of embeds for each image
    extra: dict[str, Any]  # of the line, by format
    if to == "vllm":
        request = to_vllm(family, pruned)
        target, data, embeds = output / f"{path.stem}.vllm.safetensors", request.to_bytes(), request.image_embeds
        extra = {"prompt": len(request.prompt_token_ids), "uuids": list(request.uuids)}
        length = request.embeds_per_image
        about = (
            f"{len(embeds)} image embeds, each by itself" if length is None else f"{length} image embeds for each image"
        )
    elif to == "sglang":
        for_sglang = to_sglang(family, pruned)
        embeds = for_sglang.precomputed_embeddings
        target, data = output / f"{path.stem}.sglang.safetensors", for_sglang.to_bytes()
        extra, about = {"prompt": len(for_sglang.input_ids)}, f"{len(embeds)} image embeds"
    else:
        entry = to_encoder_cache(family, pruned)
        target, data, embeds = output / entry.uuid / FILE, entry.to_bytes(), entry.image_embeds
        _make_folder(target.parent)
        extra, about = {"uuids": [entry.uuid]}, f"all {len(embeds)} image embeds"
    write_atomic(target, data, sync=True)
    line = {
        "pruned": str(path),
        "file": str(target),
        "bytes": len(data),
        "model": pruned.model,
        "question": pruned.question,
        "shape": list(embeds.shape),
        "dtype": str(embeds.dtype).removeprefix("torch."),
    }
    return line | extra, about, length


def _open(path: Path, model: str | None, families: "dict[str, Family]") -> "tuple[PrunedSet, Family]":
    """A pruned set, and its model without weights."""
    from gridprune_cli.tokens import load_pruned
    from gridprune_cli.vlm import open_model

    pruned = load_pruned(path)
    name = model or pruned.model
    if name not in families:
        families[name] = open_model(name, "auto", "auto")
    return pruned, families[name]


def _serve(
    files: Sequence[Path],
    url: str,
    api_key: str | None,
    model: str | None,
    max_new_tokens: int,
    batch_size: int,
    json: bool,
) -> None:
    """Sends the sets to a running vLLM, and prints its answers in the order of the files."""
    from gridprune_cli.integrations.vllm_http import VllmServer, as_job, send_all

    server = VllmServer(url, api_key, field="serve")
    families: dict[str, Family] = {}
    served: dict[str, str] = {}  # names of models as the server has them
    reporter = Reporter(files, json, "answered from")

    def jobs() -> "Iterator[tuple[tuple[Path, dict[str, Any]], Callable[[], VllmAnswer] | GridpruneError]]":
        for path in files:
            try:
                pruned, family = _open(path, model, families)
                name = family.checkpoint.name
                if name not in served:
                    served[name] = server.find_model(family.checkpoint)
            except GridpruneError as fault:
                if getattr(fault, "for_all", False):
                    raise
                yield (path, {}), fault
                continue
            yield (path, pruned.to_json()), as_job(server, family, pruned, served[name], max_new_tokens)

    with progress("answering", len(files)) as step:
        for (path, record), answer in send_all(server, jobs(), batch_size):
            if isinstance(answer, GridpruneError):
                reporter.fail(path, answer)
            elif json:
                emit_json(record | {"file": str(path), "answer": answer.text})
            else:
                emit_text(answer.text)
            step()
    reporter.end()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as fault:
        raise GridpruneError(
            f"can't be made ({fault.strerror}); check its folder and the disk", place=str(path)
        ) from fault
