"""`gridprune generate`: answers from pruned sets, without image, cache or vision tower."""

from pathlib import Path
from typing import Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json


def generate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Pruned sets, as `prune` writes them.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            envvar="GRIDPRUNE_MODEL",
            help="Model to answer with, where it lies elsewhere than when the set was made.",
            show_default="the one that made the set",
        ),
    ] = None,
    device: Annotated[str, typer.Option(envvar="GRIDPRUNE_DEVICE", help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(envvar="GRIDPRUNE_DTYPE", help="auto, float32, bfloat16 or float16.")] = "auto",
    max_new_tokens: options.MaxNewTokens = 128,
    json: options.Json = False,
) -> None:
    """Answer from pruned sets. Needs neither the image nor the vision tower."""
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.tokens import load_pruned

    pipelines: dict[str, Pipeline] = {}
    sets = [(path, load_pruned(path)) for path in files]  # all are checked before the
    for path, pruned in sets:  # first is answered
        name = model or pruned.model
        if name not in pipelines:
            pipelines[name] = Pipeline(name, device=device, dtype=dtype)
        answer = pipelines[name].generate(pruned, max_new_tokens=max_new_tokens)
        if json:
            emit_json(pruned.to_json() | {"file": str(path), "answer": answer})
        else:
            print(answer, flush=True)


generate.examples = (  # type: ignore[attr-defined]
    "Example: `gridprune generate star.safetensors`"
)
