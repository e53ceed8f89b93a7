"""InternVL: tiles of 56 x 56 pixels through a small tower, 4 x 4 patches joined to 2 x 2 visual tokens."""

from pathlib import Path

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from gridprune_cli.vlm.parts import without_video
from tiny_families import BOS, CHATML, EOS, PAD, VOCAB, build_tokenizer, save, wake


def write(folder: Path, layer: int = -1) -> Path:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named |= {"video_token": "<video>"}
    tokenizer = build_tokenizer([*named.values(), "<|im_start|>", "<|im_end|>"], **named)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    qwen = small | special | {"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB}
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=small | {"num_hidden_layers": 3, "image_size": 56, "patch_size": 14, "use_qk_norm": True},
            text_config=qwen | {"num_key_value_heads": 2, "max_position_embeddings": 512},
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
            vision_feature_layer=layer,
        )
    )
    wake(model, embeddings=0.03)
    sizes = {"size": {"height": 56, "width": 56}, "min_patches": 1, "max_patches": 6}
    images = GotOcr2ImageProcessor(**sizes, crop_to_patches=False)  # as published; the processor tiles all the same
    processor = without_video(InternVLProcessor)(
        image_processor=images, tokenizer=tokenizer, video_processor=None, image_seq_length=4
    )
    return save(folder, model, processor, CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"))
