"""Opens a model with its cache, from options as the command line names them: for the commands and other front ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gridprune_cli.cache.store import open_store, parse_size
from gridprune_cli.config import choose_model
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline

MODEL_OPTIONS = ("model", "clip", "relevance", "device", "dtype")
CACHE_OPTIONS = ("cache_dir", "cache_limit", "cache_dtype", "no_cache")


def open_pipeline(options: Mapping[str, Any]) -> Pipeline:
    """A pipeline as `MODEL_OPTIONS` and `CACHE_OPTIONS` say; None is as if it were left out.

    Where `model` is not among them, the variable or the config file names the model. Without any option of the cache it
    has the user's; with `no_cache` it has none. Raises BadInput, with the option, for what can't be, and for an option
    that there is not.
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
        return Pipeline(choice.model, store=store, cache_dtype=cache_dtype, **named)
    except GridpruneError as fault:
        raise choice.blame(fault) from fault
