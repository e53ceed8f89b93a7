"""LLaVA-1.5: a small CLIP tower over 56 x 56 pixels (4 x 4 visual tokens), with its CLIP in `clip`."""

from pathlib import Path

from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from tiny_families import spell, wake
from training import model as built


def write(folder: Path, seed: int = 0) -> Path:
    vocabulary = len(built.vocabulary())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    special = {"pad_token_id": built.PAD, "bos_token_id": built.BOS, "eos_token_id": built.EOS}
    vision = small | {"num_hidden_layers": 4, "image_size": 56, "patch_size": 14, "projection_dim": 32}
    text = small | special | {"num_hidden_layers": 2, "vocab_size": vocabulary, "max_position_embeddings": 12}
    llama = small | special | {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": vocabulary}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | {"projection_dim": 32}, projection_dim=32))
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config,
            text_config=llama | {"hidden_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256},
            image_token_index=built.IMAGE,
            vision_feature_layer=-2,
            **special,
        )
    )
    wake(clip, seed)
    wake(llava, seed + 1)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    spell(llava, built.make_tokenizer(close=False))
    llava.save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    processor = built.make_processor()
    processor.image_processor.size = {"shortest_edge": 56}
    processor.image_processor.crop_size = {"height": 56, "width": 56}
    processor.save_pretrained(folder)
    built.make_tokenizer(close=True).save_pretrained(folder / "clip")
    return folder
