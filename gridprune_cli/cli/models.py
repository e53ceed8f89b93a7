"""`gridprune models`: what can be named after --model, and what is taken where nothing is named."""

import os
from typing import Annotated

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.command import Command
from gridprune_cli.cli.describe import with_options
from gridprune_cli.cli.output import emit_json, say, set_quiet, size, table, warn
from gridprune_cli.errors import BadInput, GridpruneError

_SCENES = ("scenes", "ships with the package", "nothing; knows its own synthetic scenes only")

app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")


@app.callback()
def models(context: typer.Context, json: options.Json = False) -> None:
    """List the model families, with an example of what can be named after --model, and what each needs.

    A model is `scenes`, a folder with a checkpoint of one of these families in transformers' format, or its name on the
    hub. Models that are in the hub's cache already follow, with their size, and whether they can be used.
    """
    if context.invoked_subcommand is not None:
        return
    from gridprune_cli.vlm.cached import list_cached
    from gridprune_cli.vlm.support import FAMILIES

    families = [_SCENES, *((entry.model_type, entry.example, with_options(entry.needs)) for entry in FAMILIES.values())]
    names = ("family", "example", "needs")
    cached, broken = list_cached()
    if json:
        emit_json(*(dict(zip(names, row, strict=True)) for row in families))
        for model in cached:
            emit_json(
                {
                    "cached": model.name,
                    "family": model.family,
                    "bytes": model.bytes,
                    "usable": not model.reason,
                    "reason": model.reason or None,
                }
            )
    else:
        table(names, families)
        if cached:
            print()
            table(
                ("in the hub's cache", "family", "size ", "usable"),
                [(m.name, m.family or "?", size(m.bytes), f"no: {m.reason}" if m.reason else "yes") for m in cached],
            )
    if broken:
        warn(f"left out what can't be read in the hub's cache, {len(broken)} in all; the first: {broken[0]}")


@app.command("default", epilog="   gridprune models default HuggingFaceTB/SmolVLM-256M-Instruct", cls=Command)
def default(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A folder or a hub name; scenes: none any more.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Remember the model that commands take where neither --model nor GRIDPRUNE_MODEL names one, or print it.

    Of a model on the hub config.json is fetched to look at; the rest comes when it is first needed.
    """
    from gridprune_cli.config import VARIABLE, ModelChoice, choose_model, remember_model
    from gridprune_cli.vlm.checkpoint import EMBEDDED

    set_quiet(quiet)
    if name == EMBEDDED:
        path = remember_model(None)
        say(f"{path}: names no model any more; without --model, {EMBEDDED} answers about scenes, and nothing else")
    elif name is not None:
        try:
            known, family = _check(name)
        except GridpruneError as fault:
            raise ModelChoice(name, "models default").blame(fault) from fault
        path = remember_model(known)
        say(f"{path}: {known}, of family {family}, is the model where --model names none")
    choice = choose_model()
    if name is not None and choice.origin == VARIABLE:
        warn(f"{VARIABLE} is set, and goes before it: {choice.model}")
    if json:
        emit_json({"model": choice.model or EMBEDDED, "from": choice.origin})
    elif name is None:
        table(("model", "from"), [(choice.model or EMBEDDED, choice.origin)])


@app.command("forget", epilog="   gridprune models forget HuggingFaceTB/SmolVLM-256M-Instruct", cls=Command)
def forget(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A folder or a hub name.", show_default="the model in force"),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Forget what `gridprune calibrate` has remembered for a model, or what stands there by hand."""
    from gridprune_cli.config import choose_model, config_path, model_settings, remember_settings
    from gridprune_cli.vlm.checkpoint import EMBEDDED, model_key

    set_quiet(quiet)
    key = model_key(name or choose_model().model or EMBEDDED)
    if model_settings(key):
        remember_settings(key, None)
        say(f"{config_path()}: holds nothing for {key} any more")
    else:
        say(f"{config_path()}: holds nothing for {key}")


def _check(name: str) -> tuple[str, str]:
    """The name as it is found again from anywhere, and the family. Raises BadInput where it can't be used.

    Of a hub model config.json alone is looked at.
    """
    from gridprune_cli.vlm import find_supported, quantization
    from gridprune_cli.vlm.placement import place

    checkpoint = find_supported(name)
    stored = quantization(checkpoint.config)
    if stored and (lack := stored.lacks(place("auto", "auto", name).device)):
        raise BadInput(lack, field="model", value=name)
    if checkpoint.commit is None:
        checkpoint.complete()
        return os.path.abspath(checkpoint.folder), checkpoint.family
    return checkpoint.name, checkpoint.family
