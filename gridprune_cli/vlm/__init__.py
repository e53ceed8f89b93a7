"""The model families that this package knows, by the `model_type` of their config.json."""

from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find, find_clip

if TYPE_CHECKING:
    from gridprune_cli.store import Store
    from gridprune_cli.vlm.family import Family

# model_type -> class of the module of that name
FAMILIES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma3",
    "paligemma": "PaliGemma",
}


def find_supported(
    model: str, revision: str | None = None, *, flag: str = "--model", store: "Store | None" = None
) -> Checkpoint:
    """The checkpoint of a name, as `find`. Raises BadInput also where its family is none that this package knows."""
    checkpoint = find(model, revision, flag=flag, store=store)
    if checkpoint.family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BadInput(f"{flag} {model}: model type {checkpoint.family!r} is not supported (supported: {known})")
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
    BadInput, naming the flag, for unknown names and families and a device, dtype or source of relevance that can't be
    used, and GridpruneError where the hub can't be asked.
    """
    from importlib import import_module

    from gridprune_cli.device import place

    checkpoint = find_supported(model, revision, flag=flag, store=store)
    module = import_module(f"gridprune_cli.vlm.{checkpoint.family}")
    kind = getattr(module, FAMILIES[checkpoint.family])
    placed = place(device, dtype, model, checkpoint.stored)
    family: Family = kind(checkpoint, placed.dtype, placed.device, spread=placed.spread, relevance=relevance)
    if clip:
        if relevance == "words":
            raise BadInput(f"--clip {clip}: not with --relevance words; leave one of them out")
        family.clip = find_clip(checkpoint, clip)
    checkpoint.complete(flag)
    return family


__all__ = ["FAMILIES", "Checkpoint", "find", "find_supported", "open_model"]
