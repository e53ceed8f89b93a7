"""Which checkpoints can be used, by config.json alone: before a byte of weights is fetched, and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"


@dataclass(frozen=True)
class FamilyEntry:
    """What is known of a model family before anything of it is loaded.

    model_type  of its config.json, and the name of the module here that has its adapter
    adapter     the adapter's class in that module
    example     a checkpoint on the hub
    towers      for families that can be put together with several vision towers: the model_type of each that is
                supported -> the strategy that picks its patches. `default` drops the first of them, which is the CLS
                token in a CLIP, and none in a SigLIP. The first tower is transformers' default.
    """

    model_type: str
    adapter: str
    example: str
    towers: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """What its relevance needs beside the checkpoint, in words."""
        if _CLIP in self.towers:
            return "its CLIP, for relevance: fetched when needed, or found in FOLDER/clip, or named with `clip`"
        return "nothing else; relevance from the language model's attention"


# by model_type; a new family is one file here, and one line in this table
FAMILIES = {
    entry.model_type: entry
    for entry in (
        FamilyEntry("llava", "Llava", "llava-hf/llava-1.5-7b-hf", {_CLIP: "default", _SIGLIP: "full"}),
        FamilyEntry("llava_next", "LlavaNext", "llava-hf/llava-v1.6-vicuna-7b-hf", {_CLIP: "default"}),
        FamilyEntry("llava_onevision", "LlavaOnevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf", {_SIGLIP: "full"}),
        FamilyEntry("qwen2_vl", "Qwen2VL", "Qwen/Qwen2-VL-7B-Instruct"),
        FamilyEntry("qwen2_5_vl", "Qwen2_5VL", "Qwen/Qwen2.5-VL-7B-Instruct"),
        FamilyEntry("qwen3_vl", "Qwen3VL", "Qwen/Qwen3-VL-8B-Instruct"),
        FamilyEntry("internvl", "InternVL", "OpenGVLab/InternVL3-8B-hf"),
        FamilyEntry("idefics3", "Idefics3", "HuggingFaceM4/Idefics3-8B-Llama3"),
        FamilyEntry("smolvlm", "SmolVLM", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
        FamilyEntry("gemma3", "Gemma3", "google/gemma-3-4b-it"),
        FamilyEntry("paligemma", "PaliGemma", "google/paligemma2-3b-mix-448"),
    )
}
# original layouts of families, which transformers does not read: model_type -> a conversion
_CONVERTED = {
    "internvl_chat": FAMILIES["internvl"].example,
    "llava_llama": FAMILIES["llava"].example,
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": FAMILIES["llava_onevision"].example,
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
    another = f"name another, such as {FAMILIES[kind].example}"
    if isinstance(layers := config.get("vision_feature_layer"), list):
        return f"features of several layers of the tower ({layers}) are not supported; {another}"
    if towers := FAMILIES[kind].towers:
        tower = (config.get("vision_config") or {}).get("model_type") or next(iter(towers))
        if tower not in towers:
            return f"a vision tower {tower!r} is not supported (supported: {', '.join(towers)}); {another}"
        strategy = config.get("vision_feature_select_strategy", next(iter(towers.values())))
        if strategy != towers[tower]:
            return (
                f"vision_feature_select_strategy {strategy!r} is not supported for a {tower} "
                f"(supported: {towers[tower]}); {another}"
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
    for section in (config, config.get("text_config") or {}):
        if settings := section.get("quantization_config"):
            in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # older ones name no method
            return settings.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    return None


def _conversion(config: Mapping[str, Any]) -> str:
    """The name of a converted checkpoint like the one in an original layout."""
    kind = config["model_type"]
    if kind in ("llava", "llava_llama") and str(config.get("image_aspect_ratio")).startswith("anyres"):
        return FAMILIES["llava_next"].example
    return _CONVERTED.get(kind) or FAMILIES.get(kind, FAMILIES["llava"]).example
