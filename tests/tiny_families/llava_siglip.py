"""LLaVA over a small SigLIP tower, as the interleave models have: no CLS token, the last layer, a picture stretched."""

from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

from tiny_families import BOS, CHATML, EOS, PAD, VOCAB, build_tokenizer, save, wake


def write(folder: Path) -> Path:
    tokenizer = build_tokenizer(["<image>", "<|im_start|>", "<|im_end|>"])
    small = {"intermediate_size": 64, "num_attention_heads": 4}
    vision = small | {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "image_size": 56}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    qwen = small | special | {"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision | {"patch_size": 14, "vision_use_head": False},
            text_config=qwen | {"num_key_value_heads": 2, "max_position_embeddings": 512},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
    wake(model, embeddings=0.3)
    images = SiglipImageProcessor(size={"height": 56, "width": 56})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full")
    return save(folder, model, processor, CHATML.replace("IMAGE", "<image>\n"))
