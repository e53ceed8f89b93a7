"""Qwen2-VL: a small tower over patches of 14 x 14 pixels, four to a token; 4 to 40 tokens by the picture's shape."""

from pathlib import Path
from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from gridprune_cli.vlm.parts import without_video
from tiny_families import BOS, CHATML, EOS, PAD, VOCAB, build_tokenizer, save, wake

SPECIAL = ("vision_start", "vision_end", "image_pad", "video_pad", "im_start", "im_end")
TEXT = {  # so small a rope_theta that rows and columns of few tokens matter
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def write_qwen(
    folder: Path,
    kinds: tuple[Any, Any, Any],
    vision: dict[str, Any],
    text: dict[str, Any],
    embeddings: float = 1.0,
    **options: Any,
) -> Path:
    """A checkpoint of a Qwen family: its config, model and processor classes, and its two configs."""
    config_class, model_class, processor_class = kinds
    tokenizer = build_tokenizer([f"<|{name}|>" for name in SPECIAL])
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL[:2]}
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    model = model_class(config_class(vision_config=vision, text_config=text, **ids, **options))
    wake(model, embeddings=embeddings)
    side = vision["patch_size"] * vision["spatial_merge_size"]
    images = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"], size={"shortest_edge": 4 * side**2, "longest_edge": 40 * side**2}
    )
    processor = without_video(processor_class)(image_processor=images, tokenizer=tokenizer, video_processor=None)
    return save(folder, model, processor, CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"))


def write(folder: Path) -> Path:
    kinds = (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
    return write_qwen(folder, kinds, VISION | {"embed_dim": 32, "hidden_size": 64}, TEXT)
