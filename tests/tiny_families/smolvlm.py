"""SmolVLM2: as Idefics3, with smaller patches, 8 x 8 of them joined to 2 x 2 tokens."""

from pathlib import Path

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor

from gridprune_cli.vlm.parts import without_video
from gridprune_cli.vlm.smolvlm import SmolVLM
from tiny_families import CHAT, build_tokenizer, save, wake
from tiny_families.idefics3 import SIZES, SPECIAL, settings


def write(folder: Path) -> Path:
    tokenizer = build_tokenizer(SPECIAL)
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(**settings(tokenizer, patch=7, factor=4), tie_word_embeddings=True)
    )
    wake(model, embeddings=0.03)
    images = SmolVLMImageProcessor(**SIZES)
    processor = without_video(SmolVLM.processor_class)(images, tokenizer, None, image_seq_len=4)
    return save(folder, model, processor, CHAT.replace("IMAGE", "<image>"))
