"""The model families that this package knows, by the `model_type` of their config.json."""

from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find, find_clip
from gridprune_cli.vlm.support import FAMILIES, quantization, unsupported

if TYPE_CHECKING:
    from gridprune_cli.cache.store import Store
    from gridprune_cli.vlm.family import Family


def find_supported(
    model: str, revision: str | None = None, *, flag: str = "--model", store: "Store | None" = None
) -> Checkpoint:
    """The checkpoint of a name, as `find`. Raises BadInput also where config.json tells that it can't be used."""
    checkpoint = find(model, revision, flag=flag, store=store)
    try:
        reason = unsupported(checkpoint.config)
    except (AttributeError, TypeError) as fault:  # a text where an object is meant, and the like
        raise BadInput(f"{flag} {model}: config.json holds a value of the wrong kind ({fault}); mend it") from fault
    if reason:
        raise BadInput(f"{flag} {model}: {reason}")
    return checkpoint


def open_model(
    model: str,
    dtype: str,
    device: str,
    *,
    revision: str | None = None,
    clip: str | None = None,
    relevance: str = "auto",
    store: "Store | None" = None,
    flag: str = "--model",
) -> "Family":
    """The adapter of a model by name. A hub model is fetched where it is not here; nothing is loaded.

    A CLIP that is named is looked at, and fetched, before the model is; another one once relevance is needed. Raises
    BadInput, naming the flag, for unknown names and what is not supported, and for a device, dtype or source of
    relevance that can't be used, all by config.json; GridpruneError where the hub can't be asked.
    """
    from importlib import import_module

    from gridprune_cli.vlm.placement import place

    checkpoint = find_supported(model, revision, flag=flag, store=store)
    format = quantization(checkpoint.config)
    if format and format.stored_dtype:
        if dtype not in ("auto", checkpoint.stored):
            raise BadInput(
                f"--dtype {dtype}: {model} is quantised as {format.name}, and computes in {checkpoint.stored}, as its "
                "other weights are stored; leave --dtype out"
            )
        dtype = checkpoint.stored
    placed = place(device, dtype, model, checkpoint.stored)
    if format and (lack := format.lacks(placed.device.partition(":")[0])):
        raise BadInput(f"{flag} {model}: {lack}")
    module = import_module(f"gridprune_cli.vlm.{checkpoint.family}")
    kind = getattr(module, FAMILIES[checkpoint.family])
    family: Family = kind(checkpoint, placed.dtype, placed.device, spread=placed.spread, relevance=relevance)
    if clip:
        if relevance == "words":
            raise BadInput(f"--clip {clip}: not with --relevance words; leave one of them out")
        family.clip = find_clip(checkpoint, clip)
    checkpoint.complete(flag)
    return family


__all__ = ["FAMILIES", "Checkpoint", "find", "find_supported", "open_model"]
