"""Qwen2.5-VL: as Qwen2-VL, in windows of 2 x 2 tokens; the last block that looks at everything isn't the last."""

from pathlib import Path

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from tiny_families.qwen2_vl import TEXT, VISION, write_qwen


def write(folder: Path) -> Path:
    kinds = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
    vision = VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    return write_qwen(folder, kinds, vision | {"window_size": 56, "fullatt_block_indexes": [0, 2]}, TEXT)
