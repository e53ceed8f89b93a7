"""`gridprune export`: pruned sets for a serving engine."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli import choices
from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe, error_fields
from gridprune_cli.cli.output import emit_json, say, set_quiet, size, warn
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from gridprune_cli.vlm.family import Family


@examples(
    'gridprune prune photo.jpg "What is it?" --tokens 64 --positions compact -o it.safetensors',
    "gridprune export it.safetensors --to vllm -o requests/",
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
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder, which must exist, for the files: NAME.vllm.safetensors, NAME.sglang.safetensors, or "
            "UUID/encoder_cache.safetensors for vllm-ec.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that the sets are for, where it lies elsewhere than when they were made.",
            show_default="the one that made the set",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write pruned sets in the form that a serving engine takes: image embeds in place of the image, and the prompt.

    vllm: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL and Qwen-VL, pruned with --positions compact. sglang:
    Qwen-VL, with either positions. vllm-ec: whole images, of sets pruned with --keep 1.0, for vLLM's encoder cache. Of
    several sets, one that can't be exported is named, and the rest goes on.
    """
    set_quiet(quiet)
    if not os.path.isdir(output):
        raise BadInput("no folder; make it first", field="output", value=output)
    stems = Counter(path.stem for path in files)
    for path in files:
        if stems[path.stem] > 1 and to != "vllm-ec":
            reason = "another set has this name too, and one folder can't hold both; export it apart"
            raise BadInput(reason, place=str(path))
    families: dict[str, Family] = {}
    failed = 0
    lengths: set[int] = set()  # how many image embeds each image has, of sets where vLLM wants equally many
    for path in files:
        try:
            line, about, length = _export(path, output, to, model, families)
        except GridpruneError as fault:
            error = fault.about(str(path))
            if len(files) == 1:
                raise error from fault
            failed += 1
            warn(describe(error))
            if json:
                emit_json({"pruned": str(path)} | error_fields(error))
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
    if failed:
        warn(f"{failed} of {len(files)} could not be exported")
        raise typer.Exit(3)


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
    from gridprune_cli.tokens import load_pruned
    from gridprune_cli.vlm import open_model

    pruned = load_pruned(path)
    name = model or pruned.model
    if name not in families:
        families[name] = open_model(name, "auto", "auto")
    length = None  # of embeds for each image
    extra: dict[str, Any]  # of the line, by format
    if to == "vllm":
        request = to_vllm(families[name], pruned)
        target, data, embeds = output / f"{path.stem}.vllm.safetensors", request.to_bytes(), request.image_embeds
        extra = {"prompt": len(request.prompt_token_ids), "uuids": list(request.uuids)}
        length = request.embeds_per_image
        about = (
            f"{len(embeds)} image embeds, each by itself" if length is None else f"{length} image embeds for each image"
        )
    elif to == "sglang":
        for_sglang = to_sglang(families[name], pruned)
        embeds = for_sglang.precomputed_embeddings
        target, data = output / f"{path.stem}.sglang.safetensors", for_sglang.to_bytes()
        extra, about = {"prompt": len(for_sglang.input_ids)}, f"{len(embeds)} image embeds"
    else:
        entry = to_encoder_cache(families[name], pruned)
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


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as fault:
        raise GridpruneError(
            f"can't be made ({fault.strerror}); check its folder and the disk", place=str(path)
        ) from fault
