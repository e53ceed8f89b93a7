"""The files of a checkpoint as published ones have them, so that transformers 4 and serving engines load them too."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

TOWER, PUBLISHED_TOWER = "vision_tower.", "vision_tower.vision_model."


def publish(folder: Path) -> None:
    """Rewrites what transformers 5 saved in a folder. Tensors and settings keep their values.

    - A tower's weights are called `vision_tower.vision_model.*`, as in every LLaVA on the hub.
    - `rope_theta` stands in the language model's config, too, where transformers 4 looks for it, and else takes 10,000.
    - The tokenizer is of a class that transformers 4 knows, and names the two inputs that models take.
    """
    path = folder / "model.safetensors"
    save_file({published_name(name): weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    config = _read(folder / "config.json")
    text = config["text_config"]
    if "rope_parameters" in text:
        config["text_config"] = text | {"rope_theta": text["rope_parameters"]["rope_theta"]}
        _write(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    _write(folder / "tokenizer_config.json", tokenizer)


def published_name(name: str) -> str:
    """The name of a weight in the published layout, from the one that transformers 5 saves."""
    if name.startswith(TOWER) and not name.startswith(PUBLISHED_TOWER):
        return PUBLISHED_TOWER + name.removeprefix(TOWER)
    return name


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
