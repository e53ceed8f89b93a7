"""LLaVA-OneVision: tiles of 56 x 56 pixels (4 x 4 visual tokens) through a small SigLIP tower.

Mosaics of much more than two tiles are shrunk.
"""

from pathlib import Path

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
)

from gridprune_cli.vlm.parts import without_video
from tiny_families import BOS, CHATML, EOS, PAD, VOCAB, build_tokenizer, save, wake

PINPOINTS = [[56 * tall, 56 * wide] for tall in range(1, 5) for wide in range(1, 5)]  # height, width


def write(folder: Path) -> Path:
    small = {"intermediate_size": 64, "num_attention_heads": 4}
    vision = small | {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 4, "image_size": 56}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    qwen = small | special | {"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB}
    tokenizer = build_tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"])
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision | {"patch_size": 14, "vision_use_head": False},
            text_config=qwen | {"num_key_value_heads": 2, "max_position_embeddings": 512},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        )
    )
    wake(model, embeddings=0.3)
    images = LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS)
    processor = without_video(LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return save(folder, model, processor, CHATML.replace("IMAGE", "<image>\n"))
