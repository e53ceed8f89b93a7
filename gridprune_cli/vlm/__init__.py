"""The model families that this package knows, by the `model_type` of their config.json."""

from importlib import import_module
from logging import ERROR, getLogger
from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find
from gridprune_cli.vlm.support import FAMILIES, quantization, unsupported

# transformers imports torchao where it is installed, which warns of kernels for other machines and of torch's ways
getLogger("torchao").setLevel(ERROR)
getLogger("torch.utils._pytree").setLevel(ERROR)

if TYPE_CHECKING:
    from gridprune_cli.cache.store import Store
    from gridprune_cli.vlm.family import Family


def find_supported(
    model: str, revision: str | None = None, *, field: str = "model", store: "Store | None" = None
) -> Checkpoint:
    """The checkpoint of a name, as `find`. Raises BadInput also where config.json tells that it can't be used."""
    checkpoint = find(model, revision, field=field, store=store)
    try:
        reason = unsupported(checkpoint.config)
    except (AttributeError, TypeError) as fault:  # a text where an object is meant, and the like
        reason = f"config.json holds a value of the wrong kind ({fault}); mend it"
        raise BadInput(reason, field=field, value=model) from fault
    if reason:
        raise BadInput(reason, field=field, value=model)
    return checkpoint


def open_model(
    model: str,
    dtype: str,
    device: str,
    *,
    revision: str | None = None,
    clip: str | None = None,
    relevance: str = "auto",
    quantize: str | None = None,
    store: "Store | None" = None,
    field: str = "model",
) -> "Family":
    """The adapter of a model by name. A hub model is fetched where it is not here; nothing is loaded.

    A CLIP that is named is looked at, and fetched, before the model is; another one once relevance is needed. Raises
    BadInput, naming the setting `field`, for unknown names and what is not supported, and for a device, dtype or source
    of relevance that can't be used, all by config.json; GridpruneError where the hub can't be asked. `quantize` is that
    of `vlm.quantized`.
    """
    from gridprune_cli.vlm.placement import place
    from gridprune_cli.vlm.quantized import check_quantize

    checkpoint = find_supported(model, revision, field=field, store=store)
    format = quantization(checkpoint.config)
    if format and format.stored_dtype:
        if dtype not in ("auto", checkpoint.stored):
            raise BadInput(
                f"{model} is quantised as {format.name}, and computes in {checkpoint.stored}, as its other weights are "
                "stored; leave `dtype` out",
                field="dtype",
                value=dtype,
            )
        dtype = checkpoint.stored
    placed = place(device, dtype, model, checkpoint.stored)
    if format and (lack := format.lacks(placed.device.partition(":")[0])):
        raise BadInput(lack, field=field, value=model)
    check_quantize(quantize, placed)
    if format and quantize:
        raise BadInput(
            f"{model} is quantised already, as {format.name}; leave it out", field="quantize", value=quantize
        )
    adapter = family_class(checkpoint.family)
    family = adapter(
        *(checkpoint, placed.dtype, placed.device), sharded=placed.sharded, relevance=relevance, quantize=quantize
    )
    if clip:
        if relevance not in ("auto", "clip"):
            raise BadInput(f"not with `relevance={relevance}`; leave one of them out", field="clip", value=clip)
        family.take_clip(clip)
    checkpoint.complete(field)
    return family


def family_class(model_type: str) -> "type[Family]":
    """The adapter of a family. Its module is imported only now, with the model's code in transformers."""
    return getattr(import_module(f"gridprune_cli.vlm.{model_type}"), FAMILIES[model_type].adapter)


__all__ = ["FAMILIES", "Checkpoint", "family_class", "find", "find_supported", "open_model"]
