"""The model families that this package knows, by the `model_type` of their config.json."""

from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find

if TYPE_CHECKING:
    import torch

    from gridprune_cli.vlm.family import Family

# model_type -> class of the module of that name
FAMILIES = {
    "llava": "Llava",
}


def open_model(model: str, dtype: "torch.dtype", device: str) -> "Family":
    """The adapter of a model by name. Nothing is loaded yet. Raises BadInput for unknown names and families."""
    from importlib import import_module

    checkpoint = find(model)
    if checkpoint.family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BadInput(f"--model {model}: model type {checkpoint.family!r} is not supported (supported: {known})")
    module = import_module(f"gridprune_cli.vlm.{checkpoint.family}")
    return getattr(module, FAMILIES[checkpoint.family])(checkpoint, dtype, device)


__all__ = ["FAMILIES", "Checkpoint", "find", "open_model"]
