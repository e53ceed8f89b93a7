"""`gridprune generate`: answers from pruned sets, without image, cache or vision tower."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, read_stdin

if TYPE_CHECKING:
    from gridprune_cli.tokens import PrunedSet


def generate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Pruned sets, as `prune` writes them, or - for one on stdin.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to answer with, where it lies elsewhere than when the set was made.",
            show_default="the one that made the set",
        ),
    ] = None,
    device: Annotated[str, typer.Option(envvar="GRIDPRUNE_DEVICE", help=options.DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(envvar="GRIDPRUNE_DTYPE", help="auto, float32, bfloat16 or float16.")] = "auto",
    max_new_tokens: options.MaxNewTokens = 128,
    json: options.Json = False,
) -> None:
    """Answer from pruned sets. Needs neither the image nor the vision tower."""
    from gridprune_cli.pipeline import Pipeline

    pipelines: dict[str, Pipeline] = {}
    sets = [(path, _load(path)) for path in files]  # all are checked before the first is answered
    for path, pruned in sets:
        name = model or pruned.model
        if name not in pipelines:
            pipelines[name] = Pipeline(name, device=device, dtype=dtype)
        answer = pipelines[name].generate(pruned, max_new_tokens=max_new_tokens)
        if json:
            emit_json(pruned.to_json() | {"file": str(path), "answer": answer})
        else:
            print(answer, flush=True)


def _load(path: Path) -> "PrunedSet":
    from gridprune_cli.tokens import PrunedSet, load_pruned

    return PrunedSet.from_bytes(read_stdin("a pruned set"), "-") if str(path) == "-" else load_pruned(path)


generate.examples = (  # type: ignore[attr-defined]
    "Example: `gridprune generate star.safetensors`"
)
