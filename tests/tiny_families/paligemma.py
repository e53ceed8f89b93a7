"""PaliGemma: a small SigLIP tower over 56 x 56 pixels (4 x 4 visual tokens), and no chat template."""

from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from tiny_families import BOS, EOS, PAD, VOCAB, build_tokenizer, save, wake


def write(folder: Path, seed: int = 0) -> Path:
    tokenizer = build_tokenizer(["<image>"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 3, "image_size": 56, "patch_size": 14, "vision_use_head": False}
    gemma = small | {"hidden_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16}
    gemma |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}  # the places of few tokens matter
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=small | vision | {"model_type": "siglip_vision_model"},
            text_config=gemma | special | {"model_type": "gemma", "vocab_size": VOCAB, "max_position_embeddings": 512},
            projection_dim=48,
            hidden_size=48,
            vocab_size=VOCAB,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    wake(model, seed, embeddings=0.04)
    images = SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    return save(folder, model, PaliGemmaProcessor(images, tokenizer))


def inputs(processor: Any, pictures: list[Image], question: str) -> dict[str, Any]:
    """What the processor makes of a question about pictures; it puts the images in front by itself."""
    inputs = dict(processor(images=[pictures], text=[question], return_tensors="pt"))
    del inputs["labels"]  # for training
    return inputs
