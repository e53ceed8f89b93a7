"""The files of small trained modules beside a checkpoint: the compressor of `--plc trained`, and CoViPAL's module."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gridprune_cli.errors import GridpruneError

M = TypeVar("M", bound=nn.Module)


def save_trained(module: nn.Module, path: Path) -> None:
    """Writes a trained module of a checkpoint, in bfloat16, in a folder of its own."""
    weights = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in module.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, {"format": "pt"})


def load_trained(build: Callable[[dict[str, Tensor]], M], path: Path) -> M:
    """What `save_trained` wrote, in float32 on the CPU; `build` makes the module of the sizes of its weights.

    Raises GridpruneError where it can't be read.
    """
    try:
        weights = load_file(path)
        module = build(weights)
        module.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise GridpruneError(f"can't be loaded ({first}); fetch it again", place=str(path)) from fault
    return module.float().eval()
