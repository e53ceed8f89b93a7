"""Published shapes with random weights, for measuring speed where no checkpoint is at hand.

What a model costs depends on the sizes of its matrices, not on what is in them. So a shape takes from a published
checkpoint the values of its config.json that say how large it is and those of its image processor, and nothing else:
weights are random, and so are answers. Words are made up too. The tokenizer knows no word, and makes one token of each;
prompts have about as many tokens as the published model's, which makes somewhat more than one of a word.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.attention import NAME
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.clip import ClipRelevance
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.llava import Llava
from gridprune_cli.vlm.llava_next import LlavaNext
from gridprune_cli.vlm.loading import take_out_module
from gridprune_cli.vlm.parts import PARTS, make_watchable
from gridprune_cli.vlm.quantized import (
    check_quantized,
    group_size,
    linear_layers,
    quantize_module,
    quantized_bytes,
)
from gridprune_cli.vlm.qwen2_5_vl import Qwen2_5VL

_STD = 0.02  # of the weights: transformers' own `initializer_range`
_BLOCK = 1_000_003  # random values that are repeated; a prime, so that no two rows of a matrix are the same


@dataclass(frozen=True)
class Shape:
    """Sizes of a published checkpoint.

    source     its name on the hub
    config     of its config.json; the values of `tokens` are the texts of special tokens, whose ids go in there
    pictures   of its preprocessor_config.json
    processor  of its processor_config.json
    chat       its prompt, with TEXT for the question
    clip       the config.json of the CLIP that its tower was taken from
    """

    source: str
    family: type[Family]
    config: dict[str, Any]
    tokens: dict[str, str]
    pictures: dict[str, Any]
    processor: dict[str, Any]
    chat: str
    clip: dict[str, Any] | None = None

    @property
    def layers(self) -> int:
        """Layers of its language model."""
        return self.config["text_config"]["num_hidden_layers"]


_CLIP_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP = {  # openai/clip-vit-large-patch14-336
    "model_type": "clip",
    "projection_dim": 768,
    "vision_config": _CLIP_TOWER,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": 768,
    },
}
_CLIP_PICTURES = {
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_LLAVA_PROCESSOR = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,  # CLS
}
_VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}
_TILINGS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _qwen2_5_vl(source: str, width: int, **text: Any) -> Shape:
    return Shape(
        source=source,
        family=Qwen2_5VL,
        config={
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": text.pop("tied"),
            "text_config": {
                "hidden_size": width,
                "max_position_embeddings": 128_000,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                **text,
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": width,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        tokens={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        pictures={
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": 3136,
            "max_pixels": 12_845_056,
            "image_mean": _CLIP_PICTURES["image_mean"],
            "image_std": _CLIP_PICTURES["image_std"],
        },
        processor={"processor_class": "Qwen2_5_VLProcessor"},
        chat=(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>TEXT<|im_end|>\n<|im_start|>assistant\n"
        ),
    )


SHAPES = {
    "llava-1.5-7b": Shape(
        source="llava-hf/llava-1.5-7b-hf",
        family=Llava,
        config={"model_type": "llava", "vision_config": _CLIP_TOWER, "text_config": _VICUNA},
        tokens={"image_token_index": "<image>"},
        pictures={"image_processor_type": "CLIPImageProcessor", **_CLIP_PICTURES},
        processor={"processor_class": "LlavaProcessor", **_LLAVA_PROCESSOR},
        chat="USER: <image>\nTEXT ASSISTANT:",
        clip=_CLIP,
    ),
    "llava-next-7b": Shape(
        source="llava-hf/llava-v1.6-vicuna-7b-hf",
        family=LlavaNext,
        config={
            "model_type": "llava_next",
            "vision_config": _CLIP_TOWER,
            "text_config": _VICUNA,
            "image_grid_pinpoints": _TILINGS,
        },
        tokens={"image_token_index": "<image>"},
        pictures={
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _TILINGS,
            **_CLIP_PICTURES,
        },
        processor={"processor_class": "LlavaNextProcessor", **_LLAVA_PROCESSOR},
        chat=(
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. USER: <image>\nTEXT ASSISTANT:"
        ),
        clip=_CLIP,
    ),
    "qwen2.5-vl-7b": _qwen2_5_vl(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        width=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_hidden_layers=28,
        vocab_size=152_064,
        tied=False,
    ),
    "qwen2.5-vl-3b": _qwen2_5_vl(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        width=2048,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_hidden_layers=36,
        vocab_size=151_936,
        tied=True,
    ),
}


def find_shape(name: str) -> Shape:
    """Raises BadInput for a name that isn't in `SHAPES`."""
    if name not in SHAPES:
        raise BadInput(f"not one of {', '.join(SHAPES)}", field="shape", value=name)
    return SHAPES[name]


def build(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    layers: int | None = None,
    relevance: str = "auto",
    quantize: str | None = None,
) -> Family:
    """The family of a shape, all of it in memory, with the first `layers` of its language model.

    Raises BadInput where it has fewer layers, or is larger than the memory that is free.
    """
    if layers is not None and not 1 <= layers <= shape.layers:
        raise BadInput(f"{shape.source} has 1 to {shape.layers}", field="layers", value=layers)
    count = layers or shape.layers
    name = f"{shape.source} (random weights, {count} of {shape.layers} layers)"
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(shape, count, folder)
        clip = Checkpoint(f"{name}, CLIP", folder / "clip") if shape.clip and relevance in ("auto", "clip") else None
        family = shape.family(Checkpoint(name, folder), dtype, device, clip, relevance=relevance, quantize=quantize)
        family.fingerprint = name  # there are no weights on disk to tell it by
        model = _random(shape.family.model_class, folder, dtype, device, family.unread(), quantize, family.text_model)
        model.set_attn_implementation({"vision_config": NAME})
        make_watchable(model)
        family._loaded |= dict.fromkeys(PARTS, model)
        if clip and isinstance(family.relevance, ClipRelevance):
            family.relevance.model = _random(CLIPModel, folder / "clip", dtype, device, ClipRelevance.without)
        family.load_relevance()
        # what else is read of the folder
        _ = family.processor, family.encoder, family.relevance_kind, family.config, family.checkpoint.config
    return family


def _random(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    device: str,
    without: Sequence[str] = (),
    quantize: str | None = None,
    text_model: str = "",
) -> Any:
    """A model of a folder's config, without the sub-modules of dotted paths, quantised below `text_model` if asked for.

    Weights take memory one by one, so there are never more of them than in the end. Drawing billions of values would
    take minutes, so a block of them is repeated.
    """
    # 1. the model with its buffers, without memory for weights
    config = AutoConfig.from_pretrained(folder)
    with _without_memory(), torch.device(device), no_init_weights():
        model: nn.Module = kind._from_config(config, dtype=dtype)
    for path in without:
        take_out_module(model, path)
    # 2. whether there is room
    layers = linear_layers(model, text_model) if quantize else {}
    in_layers = sum(layer.weight.numel() for layer in layers.values())
    elsewhere = sum(parameter.numel() for parameter in model.parameters()) - in_layers
    group = group_size(config) if quantize == "int4" else 1
    _check_room(elsewhere * dtype.itemsize + quantized_bytes(in_layers, quantize, dtype.itemsize, group), device)
    # 3. the weights; tied ones are one
    noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul(_STD).to(device, dtype)
    filled: dict[nn.Parameter, nn.Parameter] = {}  # of those that are not quantised, which are never tied
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in filled:
                of_norm = parameter.dim() == 1 and name == "weight"
                filled[parameter] = _fill(parameter, 1.0 if of_norm else noise, device)
            module._parameters[name] = filled[parameter] if path not in layers else filled.pop(parameter)
        if path in layers:
            quantize_module(module, quantize, device, config)
    if quantize:
        check_quantized(model, text_model)
    return model.eval()


@contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters that a module gets inside have a shape and a dtype, but no memory."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # what it returns is taken
    try:
        yield
    finally:
        hook.remove()


def _fill(parameter: nn.Parameter, value: Tensor | float, device: str) -> nn.Parameter:
    """A parameter of the same shape in memory, filled with a number, or with a block of numbers that is repeated."""
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if isinstance(value, float):
        data.fill_(value)
    else:
        for block in data.view(-1).split(len(value)):
            block.copy_(value[: len(block)])
    return nn.Parameter(data, requires_grad=False)


def _check_room(size: int, device: str) -> None:
    """Raises BadInput where `size` bytes are more than the device has free, as far as that can be known."""
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        status = Path("/proc/meminfo")
        if not status.is_file():
            return
        free = next(int(s.split()[1]) << 10 for s in status.read_text().splitlines() if s.startswith("MemAvailable"))
    if size > free:
        raise BadInput(
            f"{size / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB of memory are free; "
            "take `dtype=bfloat16`, `quantize`, or fewer `layers`",
            field="shape",
        )


def _write(shape: Shape, layers: int, folder: Path) -> None:
    """Config, processor and tokenizer as a checkpoint has them."""
    tokenizer = _tokenizer(shape)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = shape.config["text_config"] | special | {"num_hidden_layers": layers}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in shape.tokens.items()}
    kind = dict(shape.config)
    AutoConfig.for_model(kind.pop("model_type"), **kind | ids | {"text_config": text}).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(shape.pictures), "utf-8")
    (folder / "processor_config.json").write_text(json.dumps(shape.processor), "utf-8")
    tokenizer.save_pretrained(folder)
    if shape.clip:
        kind = dict(shape.clip)
        text = kind["text_config"] | special
        AutoConfig.for_model(kind.pop("model_type"), **kind | {"text_config": text}).save_pretrained(folder / "clip")
        tokenizer.save_pretrained(folder / "clip")


def _tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, all of them the same, and the special tokens of the shape's prompt."""
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=sorted({*shape.tokens.values(), *re.findall(r"<[^<>]+>", shape.chat)}),
        chat_template=shape.chat.replace("TEXT", "{{ messages[-1]['content'][-1]['text'] }}"),
    )
