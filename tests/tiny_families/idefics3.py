"""Idefics3: tiles of 56 x 56 pixels, at most 4 x 4, through a small tower; 4 x 4 patches joined to 2 x 2 tokens."""

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
)

from tiny_families import BOS, CHAT, EOS, PAD, VOCAB, build_tokenizer, save, wake

SPECIAL = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>"]
SPECIAL += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]


def write(folder: Path) -> Path:
    tokenizer = build_tokenizer(SPECIAL)
    model = Idefics3ForConditionalGeneration(Idefics3Config(**settings(tokenizer, patch=14, factor=2)))
    wake(model)
    images = Idefics3ImageProcessor(**SIZES)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    return save(folder, model, processor, CHAT.replace("IMAGE", "<image>"))


SIZES = {"size": {"longest_edge": 4 * 56}, "max_image_size": {"longest_edge": 56}}


def settings(tokenizer: Any, patch: int, factor: int) -> dict[str, Any]:
    """The configuration of a small model that joins `factor` x `factor` patches of `patch` x `patch` pixels."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    llama = small | special | {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB}
    return {
        "vision_config": small | {"num_hidden_layers": 3, "image_size": 56, "patch_size": patch},
        "text_config": llama | {"num_key_value_heads": 2, "max_position_embeddings": 512},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": factor,
    }
