"""Where a model runs and in which precision, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import EMBEDDED, EMBEDDED_LOCALIZER

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device and a dtype, each with the reason for it.

    `sharded` says whether the language model goes over all GPUs; the device is then that of everything else.
    """

    device: str
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    sharded: bool = False


def place(device: str, dtype: str, model: str, stored: str = "bfloat16") -> Placement:
    """Resolves `auto` for a model by name, whose checkpoint has the dtype `stored`.

    The GPU where there is one, and bfloat16 on a GPU that has it. On a CPU bfloat16 where it measured faster (see
    `docs/families.md`) and the checkpoint is in 16 bit, else float32. `map` is as `auto`, with the language model
    sharded over all GPUs. Raises BadInput for a device that isn't there, a dtype that isn't known, and for `map`
    without accelerate.
    """
    sharded = device == "map"
    if sharded and find_spec("accelerate") is None:
        raise BadInput("needs accelerate; install it with `pip install accelerate`", field="device", value="map")
    if device in ("auto", "map"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device_reason = "a CUDA device is there" if device == "cuda" else "no CUDA device is there"
    else:
        device_reason = "asked for"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as fault:
            raise BadInput("not usable here; use `device=cpu`", field="device", value=device) from fault
    if dtype == "auto":
        kind, dtype_reason = _auto(device, model, stored)
    elif dtype in DTYPES:
        kind, dtype_reason = DTYPES[dtype], "asked for"
    else:
        raise BadInput(f"not one of auto, {', '.join(DTYPES)}", field="dtype", value=dtype)
    return Placement(device, device_reason, kind, dtype_reason, sharded)


def _auto(device: str, model: str, stored: str) -> tuple[torch.dtype, str]:
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float32, "the GPU doesn't compute in bfloat16"
    if kind != "cpu":
        return torch.float32, "exact; bfloat16 was not measured on this device"
    if model in (EMBEDDED, EMBEDDED_LOCALIZER):
        return torch.float32, "exact, and the embedded model is too small for bfloat16 to be faster"
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch learnt to tell after 2.6
    if not able.get("avx512_bf16"):
        return torch.float32, "exact, and faster than bfloat16 on a CPU without AVX512_BF16"
    if stored not in ("bfloat16", "float16"):
        return torch.float32, "exact, as the checkpoint is stored"
    return torch.bfloat16, "the CPU reads prompts faster in it (AVX512_BF16); a checkpoint in float32 stays so"
