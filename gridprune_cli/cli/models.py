"""`gridprune models`: what can be named after --model."""

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, table

_ROWS = (
    ("scenes", "ships with the package", "answers about its own synthetic scenes only; needs nothing else"),
    ("FOLDER (llava)", "a LLaVA-1.5 checkpoint", "relevance needs its CLIP in FOLDER/clip"),
)


def models(json: options.Json = False) -> None:
    """List what can be named after --model, and what each needs."""
    names = ("model", "what", "needs")
    if json:
        for row in _ROWS:
            emit_json(dict(zip(names, row, strict=True)))
    else:
        table(names, _ROWS)
