"""Loading a part of a checkpoint: what is left out is never built, and its weights are never read from disk."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from gridprune_cli.errors import GridpruneError


def load_part(
    cls: type[PreTrainedModel], folder: Path, without: Collection[str], dtype: torch.dtype, device: str | None
) -> PreTrainedModel:
    """The model of a folder without the sub-modules named by dotted paths, in evaluation mode on the device.

    Without a device, accelerate divides it over all there are: GPUs first, then memory.

    transformers builds a model without memory first and reads only the weights that it then finds a place for, so a
    sub-module that is taken out while building costs neither. The subclass keeps the class's name and module, because
    transformers looks its checkpoint key mappings up by them.

    Raises GridpruneError where a weight that the part needs is not in the checkpoint.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        for path in without:
            _take_out(self, path)

    made: dict[str, Any] = {"__init__": build, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if "lm_head" in without:
        made["_tied_weights_keys"] = {}  # tied to a module that isn't there
    part: Any = type(cls.__name__, (cls,), made)
    # a config may name an attention of its own, which transformers would fetch and run as a kernel
    options: dict[str, Any] = {"attn_implementation": "sdpa"} | ({"device_map": "auto"} if device is None else {})
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it reports the weights left out, which is the point
    logging.disable_progress_bar()
    try:
        model, info = part.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, SafetensorError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise GridpruneError(f"{folder}: can't be loaded ({first})") from fault
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise GridpruneError(
            f"{folder}: {len(missing)} weights that {cls.__name__} needs are missing or of another shape "
            f"(first: {missing[0]}); the checkpoint is incomplete, fetch it again"
        )
    return model.eval() if device is None else model.eval().to(device)


def _take_out(model: nn.Module, path: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in model._modules:
            return
        model = model._modules[parent]  # type: ignore[assignment]
    model._modules.pop(name, None)
