"""LLaVA-NeXT: tiles of 56 x 56 pixels (4 x 4 visual tokens) through a small CLIP tower, with its CLIP in `clip`."""

from pathlib import Path

from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from tiny_families import BOS, CHAT, EOS, PAD, VOCAB, build_tokenizer, save, wake

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # height, width


def write(folder: Path) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    vision = small | {"num_hidden_layers": 4, "image_size": 56, "patch_size": 14, "projection_dim": 32}
    text = small | special | {"num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 77}
    llama = small | special | {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": VOCAB}
    tokenizer = build_tokenizer(["<image>"])
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | {"projection_dim": 32}, projection_dim=32))
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=clip.config.vision_config,
            text_config=llama | {"hidden_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=16,
        )
    )
    wake(clip)
    wake(model, 1, embeddings=0.1)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return save(folder, model, processor, CHAT.replace("IMAGE", "<image>\n"))
