"""Opens a model with its cache, from options as the command line names them: for the commands and other front ends."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gridprune_cli.cache.store import open_store, parse_size
from gridprune_cli.config import choose_model, config_path, model_settings
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm.checkpoint import model_key
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.relevance import Calibration

_log = logging.getLogger(__name__)

MODEL_OPTIONS = ("model", "clip", "relevance", "device", "dtype", "quantize")
CACHE_OPTIONS = ("cache_dir", "cache_limit", "cache_dtype", "no_cache")


def open_pipeline(options: Mapping[str, Any]) -> Pipeline:
    """A pipeline as `MODEL_OPTIONS` and `CACHE_OPTIONS` say; None is as if it were left out.

    Where `model` is not among them, the variable or the config file names the model. Without any option of the cache it
    has the user's; with `no_cache` it has none. What the config file remembers for the model is in force. Raises
    BadInput, with the option, for what can't be, for an option that there is not, and for a config file of no use.
    """
    named = {name: value for name, value in options.items() if value is not None}
    known = (*MODEL_OPTIONS, *CACHE_OPTIONS)
    if unknown := sorted(named.keys() - set(known)):
        raise BadInput(f"no setting of a model; there are {', '.join(known)}", field=unknown[0])
    limit = named.pop("cache_limit", None)
    folder = named.pop("cache_dir", None)
    store = None if named.pop("no_cache", False) else open_store(None if folder is None else Path(folder))
    if store and limit is not None:
        store.limit = parse_size(str(limit), "cache_limit") or None
    choice = choose_model(named.pop("model", None))
    cache_dtype = named.pop("cache_dtype", "full")
    try:
        pipeline = Pipeline(choice.model, store=store, cache_dtype=cache_dtype, **named)
    except GridpruneError as fault:
        raise choice.blame(fault) from fault
    take_settings(pipeline.family, model_key(pipeline.model), "clip" in named)
    return pipeline


def take_settings(family: Family, key: str, clip_named: bool = False) -> None:
    """Has a model take what the config file remembers for it under its key, unless that was of other weights.

    Where a CLIP was named, relevance comes from that. Raises BadInput, naming the config file, for settings that the
    model can't have.
    """
    settings = model_settings(key)
    weights = settings.pop("fingerprint", None)
    if weights is not None and weights != family.fingerprint:  # which reads of all weights
        _log.warning(
            "%s: what it holds for %s was chosen for other weights, and is not taken; run `gridprune calibrate` again, "
            "or `gridprune models forget %s`",
            *(config_path(), key, key),
        )
        return
    place = f"{config_path()}: {key}"
    known = [setting.name for setting in fields(Calibration)]
    if unknown := sorted(settings.keys() - set(known)):
        raise BadInput(f"no setting of a model here; there are {', '.join(known)}", place=f"{place}: {unknown[0]}")
    if clip_named:
        settings.pop("relevance", None)
    try:
        family.calibrate(Calibration(**settings))
    except BadInput as fault:
        reason = f"{fault.reason}; mend it, or run `gridprune models forget {key}`"
        raise BadInput(reason, place=f"{place}: {fault.field} = {fault.value}") from fault
