"""Where a model runs and in which precision, and why."""

from dataclasses import dataclass

import torch

from gridprune_cli.errors import BadInput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device and a dtype, each with the reason for it."""

    device: str
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str


def place(device: str = "auto", dtype: str = "auto") -> Placement:
    """Resolves `auto`: the GPU where there is one; bfloat16 on a GPU that has it, float32 on a CPU.

    Raises BadInput for a device that isn't there or a dtype that isn't known.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device_reason = "a CUDA device is there" if device == "cuda" else "no CUDA device is there"
    else:
        device_reason = "asked for"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as fault:
            raise BadInput(f"--device {device}: not usable here; use --device cpu") from fault
    if dtype == "auto":
        if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
            return Placement(device, device_reason, torch.bfloat16, "the GPU computes in it")
        return Placement(device, device_reason, torch.float32, "exact, and no slower than 16 bit on most CPUs")
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    return Placement(device, device_reason, DTYPES[dtype], "asked for")
