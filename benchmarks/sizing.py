"""What an encoded image takes on disk, per family: `python -m benchmarks.sizing [WIDTHxHEIGHT...]`.

A picture of noise goes through each family's own encoding, with the widths and the picture settings of a published
checkpoint. The bytes of the entry that the cache would write are counted, in 16 bit, and how many such entries 20 GiB
hold, the cache's limit where none is set; `prefix` are the MiB of the entry that relevance from attention adds, for the
image's own tokens, by the numbers of the published language model. Nothing is downloaded. How many layers a tower has,
and what is in its weights, changes no shape: so towers are cut to a few layers, of random weights, and language models
to next to nothing.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.attention import NAME
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.gemma3 import Gemma3
from gridprune_cli.vlm.idefics3 import Idefics3
from gridprune_cli.vlm.internvl import InternVL
from gridprune_cli.vlm.llava_onevision import LlavaOnevision
from gridprune_cli.vlm.paligemma import PaliGemma
from gridprune_cli.vlm.parts import PARTS
from gridprune_cli.vlm.qwen2_vl import Qwen2VL
from gridprune_cli.vlm.qwen3_vl import Qwen3VL
from gridprune_cli.vlm.relevance import middle_depth
from gridprune_cli.vlm.shapes import SHAPES
from gridprune_cli.vlm.smolvlm import SmolVLM

PICTURES = ((640, 480), (1280, 960))
LAYERS = 3  # of a tower: Qwen3-VL stores what each of three gives
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_IDEFICS = {name: value for name, value in _SIGLIP.items() if name not in ("model_type", "vision_use_head")}
_QWEN = {"num_heads": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_TOKENS = SHAPES["qwen2.5-vl-7b"].tokens
_MOSAICS = [[384 * tall, 384 * wide] for tall in range(1, 7) for wide in range(1, 7)]


@dataclass(frozen=True)
class Layout:
    """What decides how a family stores pictures. Values are those of a published checkpoint.

    config     of its config.json, without the language model's
    tokens     texts of special tokens: their ids go into the config, or, where the tokenizer has names for them, there
    pictures   of its preprocessor_config.json
    processor  of its processor_config.json
    decoder    of the published language model: layers, key-value heads, the width of one, and that of a hidden state
    """

    source: str
    family: type[Family]
    config: dict[str, Any]
    tokens: dict[str, str]
    pictures: dict[str, Any]
    processor: dict[str, Any]
    decoder: tuple[int, int, int, int]


def _shape(name: str) -> Layout:
    shape, text = SHAPES[name], SHAPES[name].config["text_config"]
    heads = text["num_attention_heads"]
    hidden = text["hidden_size"]
    decoder = text["num_hidden_layers"], text.get("num_key_value_heads", heads), hidden // heads, hidden
    config = {key: value for key, value in shape.config.items() if key != "text_config"}
    return Layout(shape.source, shape.family, config, shape.tokens, shape.pictures, shape.processor, decoder)


def _square(kind: str, side: int, **more: Any) -> dict[str, Any]:
    return {"image_processor_type": kind, "size": {"height": side, "width": side}} | more


def _tiles(kind: str, side: int) -> dict[str, Any]:
    sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    return {"image_processor_type": kind} | sizes


LAYOUTS = (
    _shape("llava-1.5-7b"),
    _shape("llava-next-7b"),
    Layout(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        LlavaOnevision,
        {
            "model_type": "llava_onevision",
            "vision_config": _SIGLIP | {"image_size": 384},
            "text_config": {"model_type": "qwen2", "hidden_size": 3584},  # projected features are stored
            "image_grid_pinpoints": _MOSAICS,
            "vision_aspect_ratio": "anyres_max_9",
        },
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        _square("LlavaOnevisionImageProcessor", 384, image_grid_pinpoints=_MOSAICS),
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 729,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        (28, 4, 128, 3584),
    ),
    Layout(
        "Qwen/Qwen2-VL-7B-Instruct",
        Qwen2VL,
        {
            "model_type": "qwen2_vl",
            "vision_config": _QWEN | {"embed_dim": 1280, "hidden_size": 3584, "patch_size": 14},
        },
        _QWEN_TOKENS,
        SHAPES["qwen2.5-vl-7b"].pictures,
        {"processor_class": "Qwen2VLProcessor"},
        (28, 4, 128, 3584),
    ),
    _shape("qwen2.5-vl-7b"),
    Layout(
        "Qwen/Qwen3-VL-8B-Instruct",
        Qwen3VL,
        {
            "model_type": "qwen3_vl",
            "vision_config": _QWEN
            | {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "out_hidden_size": 4096,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [0, 1, 2],  # three of them, as 8, 16 and 24 are
            },
        },
        _QWEN_TOKENS,
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 16,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        },
        {"processor_class": "Qwen3VLProcessor"},
        (36, 8, 128, 4096),
    ),
    Layout(
        "OpenGVLab/InternVL3-8B-hf",
        InternVL,
        {
            "model_type": "internvl",
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "image_size": 448,
                "patch_size": 14,
            },
        },
        {
            "image_token_id": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        _square("GotOcr2ImageProcessor", 448, crop_to_patches=False, min_patches=1, max_patches=12),
        {"processor_class": "InternVLProcessor", "image_seq_length": 256},  # which crops to patches all the same
        (28, 4, 128, 3584),
    ),
    Layout(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        Idefics3,
        {"model_type": "idefics3", "vision_config": _IDEFICS | {"image_size": 364}, "scale_factor": 2},
        {"image_token_id": "<image>"},
        _tiles("Idefics3ImageProcessor", 364),
        {"processor_class": "Idefics3Processor", "image_seq_len": 169},
        (32, 8, 128, 4096),
    ),
    Layout(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        SmolVLM,
        {"model_type": "smolvlm", "vision_config": _IDEFICS | {"image_size": 384}, "scale_factor": 3},
        {"image_token_id": "<image>"},
        _tiles("SmolVLMImageProcessor", 384),
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 81},
        (24, 32, 64, 2048),
    ),
    Layout(
        "google/gemma-3-4b-it",
        Gemma3,
        {"model_type": "gemma3", "vision_config": _SIGLIP | {"image_size": 896}, "mm_tokens_per_image": 256},
        {
            "image_token_index": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        _square("Gemma3ImageProcessor", 896),
        {"processor_class": "Gemma3Processor", "image_seq_length": 256},
        (34, 4, 256, 2560),
    ),
    Layout(
        "google/paligemma2-3b-mix-448",
        PaliGemma,
        {"model_type": "paligemma", "vision_config": _SIGLIP | {"image_size": 448}},
        {"image_token_index": "<image>"},
        _square("SiglipImageProcessor", 448, image_seq_length=1024),
        {"processor_class": "PaliGemmaProcessor"},
        (26, 4, 256, 2304),
    ),
)


def thin(layout: Layout, folder: Path) -> Family:
    """The family of a layout with few layers; its config, processor and tokenizer go into the folder."""
    named = {name: text for name, text in layout.tokens.items() if not name.endswith(("_id", "_index"))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens=sorted(set(layout.tokens.values())),
        model_specific_special_tokens=named or None,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in layout.tokens.items() if name not in named}
    config, vision = dict(layout.config), dict(layout.config["vision_config"])
    vision["depth" if "num_heads" in vision else "num_hidden_layers"] = LAYERS
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [LAYERS - 1]
    text = TEXT | config.pop("text_config", {})
    layout_config = AutoConfig.for_model(
        config.pop("model_type"), **config | ids | {"vision_config": vision, "text_config": text}
    )
    layout_config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(layout.pictures), "utf-8")
    (folder / "processor_config.json").write_text(json.dumps(layout.processor), "utf-8")
    tokenizer.save_pretrained(folder)
    model = layout.family.model_class._from_config(layout_config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation({"vision_config": NAME})
    family = layout.family(Checkpoint(layout.source, folder), torch.bfloat16, "cpu")
    family._loaded |= dict.fromkeys(PARTS, model)
    return family


def prefix_bytes(layout: Layout, image: EncodedImage) -> int:
    """Of keys, values and hidden states of an image's placeholders in 16 bit; 0 where the image sees the question.

    In Gemma 3 each sixth layer attends to everything, the others to a window.
    """
    if layout.family.sees_question:
        return 0
    layers, heads, width, hidden = layout.decoder
    wide = 6 if layout.family is Gemma3 else 1
    kinds = ["sliding_attention" if (layer + 1) % wide else "full_attention" for layer in range(layers)]
    return 2 * (2 * middle_depth(kinds) * heads * width + hidden) * len(image.placeholder_map)


def picture(width: int, height: int) -> Picture:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Picture(Image.fromarray(pixels), "0" * 64, "noise.png")


def main() -> None:
    logging.set_verbosity_error()
    sizes = [tuple(map(int, argument.split("x"))) for argument in sys.argv[1:]] or PICTURES
    print(
        f"{'model_type':15}  {'picture':>10}  {'tokens':>6}  {'width':>6}  {'bytes':>11}   MiB  in 20G  prefix  as in"
    )
    for layout in LAYOUTS:
        with TemporaryDirectory() as folder:
            pipeline = Pipeline(thin(layout, Path(folder)))
            for width, height in sizes:
                (image,) = pipeline.encoder.run_tower([picture(width, height)])
                count, channels = image.vision_features.shape
                size = len(image.to_bytes())
                print(
                    f"{layout.config['model_type']:15}  {f'{width}x{height}':>10}  {count:6}  {channels:6}  {size:11,}"
                    f"  {size / 2**20:4.1f}  {(20 << 30) // size:6,}"
                    f"  {prefix_bytes(layout, image) / 2**20:6.1f}  {layout.source}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
