"""Qwen3-VL: as Qwen2-VL, over patches of 16 x 16 pixels, with two levels of deepstack and tied word embeddings."""

from pathlib import Path

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tiny_families.qwen2_vl import TEXT, VISION, write_qwen

ROPE = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}


def write(folder: Path) -> Path:
    kinds = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
    vision = VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    text = TEXT | {"head_dim": 16, "rope_parameters": ROPE}
    return write_qwen(folder, kinds, vision, text, embeddings=0.03, tie_word_embeddings=True)
