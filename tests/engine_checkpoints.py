"""Tiny checkpoints that serving engines load: their attention has heads of few sizes, and they know published names."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_families import PAD, wake

from gridprune_cli.vlm import family_class

EMBEDDINGS = {"llava_next": 0.1, "llava_onevision": 0.3, "internvl": 0.03, "qwen3_vl": 0.03}  # as in tiny_families


def write_for_engines(family: str, tiny: Path, folder: Path) -> Path:
    """A checkpoint like the `tiny` one of a family, with a language model of heads of 32 numbers. Returns the folder.

    Towers of CLIP and SigLIP get the names that published checkpoints have; transformers saves other ones today. As in
    published ones, mosaics of LLaVA-OneVision are shrunk from nine tiles on, which vLLM takes for granted.
    """
    model_class = family_class(family).model_class
    shutil.copytree(tiny, folder)
    config = model_class.config_class.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim = 64, 2, 1, 32
    text.max_position_embeddings = 512
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [4, 6, 6]  # halves of a head: time, rows, columns
    if family == "llava_onevision":
        config.vision_aspect_ratio = "anyres_max_9"
        settings = folder / "processor_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"vision_aspect_ratio": "anyres_max_9"}))
    model = model_class(config)
    wake(model, embeddings=EMBEDDINGS.get(family, 1.0))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    model.save_pretrained(folder)
    if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        weights = load_file(folder / "model.safetensors")
        prefix = "vision_tower."
        named = {name.replace(prefix, prefix + "vision_model."): weights[name] for name in weights}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder
