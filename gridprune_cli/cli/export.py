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
            "--output", "-o", help="Folder, which must exist, for the files NAME.vllm.safetensors.", show_default=False
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

    For vLLM: LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, pruned with --positions compact. Of several sets, one that
    can't be exported is named, and the rest goes on.
    """
    set_quiet(quiet)
    if not os.path.isdir(output):
        raise BadInput("no folder; make it first", field="output", value=output)
    targets = [output / f"{path.stem}.vllm.safetensors" for path in files]
    times = Counter(targets)
    for path, target in zip(files, targets, strict=True):
        if times[target] > 1:
            reason = "another set has this name too, and one folder can't hold both; export it apart"
            raise BadInput(reason, place=str(path))
    families: dict[str, Family] = {}
    failed = 0
    lengths: set[int] = set()  # of the image embeds of each set
    for path, target in zip(files, targets, strict=True):
        try:
            line = _export(path, target, model, families)
        except GridpruneError as fault:
            error = fault.about(str(path))
            if len(files) == 1:
                raise error from fault
            failed += 1
            warn(describe(error))
            if json:
                emit_json({"pruned": str(path)} | error_fields(error))
            continue
        lengths.add(line["shape"][1])
        if json:
            emit_json(line)
        say(f"{target}: {line['shape'][1]} image embeds for each image, {size(line['bytes'])}")
    if len(lengths) > 1:
        warn(
            f"these sets have from {min(lengths)} to {max(lengths)} image embeds for an image, and vLLM takes only "
            "equal ones at once; docs/vllm.md says what to do"
        )
    if failed:
        warn(f"{failed} of {len(files)} could not be exported")
        raise typer.Exit(3)


def _export(path: Path, target: Path, model: str | None, families: "dict[str, Family]") -> dict[str, Any]:
    """Writes one set, and says what there is in it. `families` holds the models that were opened."""
    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.integrations.vllm import to_vllm
    from gridprune_cli.tokens import load_pruned
    from gridprune_cli.vlm import open_model

    pruned = load_pruned(path)
    name = model or pruned.model
    if name not in families:
        families[name] = open_model(name, "auto", "auto")
    request = to_vllm(families[name], pruned)
    data = request.to_bytes()
    write_atomic(target, data, sync=True)
    return {
        "pruned": str(path),
        "file": str(target),
        "bytes": len(data),
        "model": pruned.model,
        "question": pruned.question,
        "shape": list(request.image_embeds.shape),
        "dtype": str(request.image_embeds.dtype).removeprefix("torch."),
        "prompt": len(request.prompt_token_ids),
        "uuids": list(request.uuids),
    }
