"""The model families that this package knows, by the `model_type` of their config.json."""

from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find, find_clip
from gridprune_cli.vlm.support import FAMILIES, quantization, unsupported

if TYPE_CHECKING:
    from gridprune_cli.store import Store
    from gridprune_cli.vlm.family import Family


def open_model(
    model: str,
    dtype: str,
    device: str,
    *,
    revision: str | None = None,
    clip: str | None = None,
    store: "Store | None" = None,
    flag: str = "--model",
) -> "Family":
    """The adapter of a model by name, and its CLIP's. A hub model is fetched where it is not here; nothing is loaded.

    Raises BadInput, naming the flag, for unknown names and what is not supported, and for a device or dtype that can't
    be used, all by config.json; GridpruneError where the hub can't be asked.
    """
    from importlib import import_module

    from gridprune_cli.device import place

    checkpoint = find(model, revision, flag=flag, store=store)
    if reason := unsupported(checkpoint.config):
        raise BadInput(f"{flag} {model}: {reason}")
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
    return kind(checkpoint.complete(flag), placed.dtype, placed.device, find_clip(checkpoint, clip), placed.spread)


__all__ = ["FAMILIES", "Checkpoint", "find", "open_model"]
