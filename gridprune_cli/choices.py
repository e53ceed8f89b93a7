"""Settings that take one of a few values, as types: for the library, the command line's help and shell completion.

Nothing here needs torch.
"""

import os
import pkgutil
from typing import TYPE_CHECKING, Literal

Relevance = Literal["auto", "clip", "attention", "both", "words"]
Positions = Literal["original", "compact"]
Plc = Literal["off", "pool", "trained"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int4"]
CacheDtype = Literal["full", "float8", "int8"]
Engine = Literal["local", "ray", "vllm"]
EncodingEngine = Literal["local", "ray"]  # of those, what runs a vision tower
Metric = Literal["exact", "vqa", "pope", "relaxed", "anls"]
Shape = Literal["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen2.5-vl-3b"]
Schedule = Literal["btp", "g-search"]  # of a method, found on samples
ExportFormat = Literal["vllm", "vllm-ec", "sglang"]

DEFAULT_METHOD = "gridprune"


def list_methods() -> tuple[str, ...]:
    """The names of the pruning methods, the default one first. They are the names of their files, `_` for `-`.

    To take them from the registry `METHODS` would import torch, which takes longer than help should.
    """
    folder = os.path.join(os.path.dirname(__file__), "pruning", "methods")
    files = [module.name for module in pkgutil.iter_modules([folder]) if module.name != "base"]
    return (DEFAULT_METHOD, *sorted({name.replace("_", "-") for name in files} - {DEFAULT_METHOD}))


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[list_methods()]
