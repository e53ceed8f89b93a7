"""Which checkpoints can be used, by config.json alone: before a byte of weights is fetched, and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

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

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
# of families that can be put together with several vision towers: tower -> the strategy that picks its patches.
# `default` drops the first of them, which is the CLS token in a CLIP, and none in a SigLIP. The first is transformers'
# default.
_TOWERS = {
    "llava": {_CLIP: "default", _SIGLIP: "full"},
    "llava_next": {_CLIP: "default"},
    "llava_onevision": {_SIGLIP: "full"},
}
_EXAMPLES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
}
# original layouts of families, which transformers does not read: model_type -> a conversion
_CONVERTED = {
    "internvl_chat": _EXAMPLES["internvl"],
    "llava_llama": _EXAMPLES["llava"],
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": _EXAMPLES["llava_onevision"],
}


@dataclass(frozen=True)
class Format:
    """How a quantised checkpoint's weights are stored.

    name          as docs/families.md has it
    packages      what transformers reads it with, as pip and import name them
    cpu           whether it is supported on a CPU; it was tried where it is
    stored_dtype  whether it computes in the dtype of the checkpoint's other weights alone
    """

    name: str
    packages: Mapping[str, str]
    cpu: bool = True
    stored_dtype: bool = True

    def lacks(self, device: str) -> str:
        """What stands in the way of it on a device (`cpu`, `cuda`...): a package, or the device. Empty for nothing."""
        if device == "cpu" and not self.cpu:
            return f"quantised as {self.name}, which is supported on GPUs alone; name one that is not quantised so"
        missing = [name for name, module in self.packages.items() if find_spec(module) is None]
        if missing:
            names = " ".join(missing)
            return f"quantised as {self.name}, which needs {' and '.join(missing)}; install with `pip install {names}`"
        return ""


_ACCELERATE = {"accelerate": "accelerate"}
# quant_method -> format
FORMATS = {
    "bitsandbytes": Format("bitsandbytes", {"bitsandbytes": "bitsandbytes", **_ACCELERATE}),
    "torchao": Format("torchao", {"torchao": "torchao", **_ACCELERATE}),
    "compressed-tensors": Format(
        "compressed-tensors", {"compressed-tensors": "compressed_tensors", **_ACCELERATE}, stored_dtype=False
    ),
    "fp8": Format("FP8", _ACCELERATE),
    "awq": Format("AWQ", {"gptqmodel": "gptqmodel", **_ACCELERATE}, cpu=False),
    "gptq": Format("GPTQ", {"gptqmodel": "gptqmodel", "optimum": "optimum", **_ACCELERATE}, cpu=False),
}


def unsupported(config: Mapping[str, Any]) -> str:
    """Why a checkpoint of this config can't be used, and what could be instead. Empty where it can.

    Whether a quantised one can be used on this machine too, `quantization` and its `lacks` tell.
    """
    kind = config["model_type"]
    mm_settings = kind.startswith("llava") and any(key.startswith("mm_") for key in config)
    if mm_settings or kind in _CONVERTED:
        layout = f"{kind!r} with mm_* settings" if mm_settings else repr(kind)
        return (
            f"the original layout {layout}, which transformers does not read; name a converted checkpoint, such as "
            f"{_conversion(config)}"
        )
    if kind not in FAMILIES:
        return f"model type {kind!r} is not supported (supported: {', '.join(sorted(FAMILIES))})"
    if isinstance(layers := config.get("vision_feature_layer"), list):
        return f"features of several layers of the tower ({layers}) are not supported; name another{_such(kind)}"
    if kind in _TOWERS:
        towers = _TOWERS[kind]
        tower = (config.get("vision_config") or {}).get("model_type") or next(iter(towers))
        if tower not in towers:
            known = ", ".join(towers)
            return f"a vision tower {tower!r} is not supported (supported: {known}); name another{_such(kind)}"
        strategy = config.get("vision_feature_select_strategy", next(iter(towers.values())))
        if strategy != towers[tower]:
            return (
                f"vision_feature_select_strategy {strategy!r} is not supported for a {tower} "
                f"(supported: {towers[tower]}); name another{_such(kind)}"
            )
    method = _method(config)
    if method is not None and method not in FORMATS:
        return f"quantised as {method!r}, which is not supported (supported: {', '.join(sorted(FORMATS))})"
    return ""


def quantization(config: Mapping[str, Any]) -> Format | None:
    """The format of a quantised checkpoint's weights, None for one that is not quantised."""
    method = _method(config)
    return None if method is None else FORMATS[method]


def _method(config: Mapping[str, Any]) -> str | None:
    for part in (config, config.get("text_config") or {}):
        if settings := part.get("quantization_config"):
            in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # older ones name no method
            return settings.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    return None


def _such(family: str) -> str:
    return f", such as {_EXAMPLES[family]}" if family in _EXAMPLES else ""


def _conversion(config: Mapping[str, Any]) -> str:
    """The name of a converted checkpoint like the one in an original layout."""
    kind = config["model_type"]
    if kind in ("llava", "llava_llama") and str(config.get("image_aspect_ratio")).startswith("anyres"):
        return _EXAMPLES["llava_next"]
    return _CONVERTED.get(kind) or _EXAMPLES.get(kind, _EXAMPLES["llava"])
