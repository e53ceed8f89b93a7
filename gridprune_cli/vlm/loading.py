"""Loading a part of a checkpoint: what is left out is never built, and its weights are never read from disk."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.weights import check_pickles

getLogger("bitsandbytes").setLevel(ERROR)  # it warns of rounding at every matrix product in 8 bit


def load_part(
    cls: type[PreTrainedModel],
    folder: Path,
    without: Collection[str],
    dtype: torch.dtype,
    device: str | None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """The model of a folder without the sub-modules named by dotted paths, in evaluation mode on the device.

    Without a device, accelerate divides it over all there are: GPUs first, then memory. `quantization_config` is
    transformers', for weights that are quantised one by one as they are read, on the device.

    transformers builds a model without memory first and reads only the weights that it then finds a place for, so a
    sub-module that is taken out in between costs neither. It is taken out after a quantised checkpoint's layers were
    put in, because which layers are quantised is decided on the whole model. The subclass keeps the class's name and
    module, because transformers looks its checkpoint key mappings up by them.

    Raises GridpruneError where a weight that the part needs is not in the checkpoint, BadInput for pickled weights that
    hold more than tensors.
    """
    built: list[nn.Module] = []

    check_pickles(folder)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        built.append(self)

    @contextmanager
    def take_out() -> Iterator[None]:
        yield
        for path in without:
            take_out_module(built[0], path)

    def contexts(_: Any, *args: Any, **kwargs: Any) -> list[AbstractContextManager]:
        """What transformers builds a model within; the first is left last."""
        return [take_out(), *cls.get_init_context(*args, **kwargs)]

    members: dict[str, Any] = {"__init__": build, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members["get_init_context"] = classmethod(contexts)
    if "lm_head" in without:
        members["_tied_weights_keys"] = {}  # tied to a module that isn't there
    partial_class: Any = type(cls.__name__, (cls,), members)
    # a config may name an attention, which transformers would fetch and run as a kernel; None is its default instead
    options: dict[str, Any] = {"attn_implementation": None} | ({"device_map": "auto"} if device is None else {})
    if quantization_config is not None:
        options |= {"quantization_config": quantization_config, "device_map": device}
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it reports the weights left out, which is the point
    logging.disable_progress_bar()
    try:
        model, info = partial_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, weights_only=True, **options
        )
    except (OSError, ValueError, SafetensorError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise GridpruneError(f"can't be loaded ({first})", place=str(folder)) from fault
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise GridpruneError(
            f"{len(missing)} weights that {cls.__name__} needs are missing or of another shape "
            f"(first: {missing[0]}); the checkpoint is incomplete, fetch it again",
            place=str(folder),
        )
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()
        _decompress(model)
    return model.eval() if device is None else model.eval().to(device)


def _decompress(model: nn.Module) -> None:
    """Unpacks weights now that compressed-tensors would unpack when the whole model is called: its modules are too."""
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization.utils import is_module_quantized

    for module in model.modules():
        if is_module_quantized(module):
            decompress_module(module)


def take_out_module(model: nn.Module, path: str) -> None:
    """Takes the sub-module of a dotted path out of a model that has it."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in model._modules:
            return
        model = model._modules[parent]  # type: ignore[assignment]
    model._modules.pop(name, None)
