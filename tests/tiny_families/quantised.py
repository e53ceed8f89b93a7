"""Tiny checkpoints of which the language model's layers are quantised, as published ones are."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 8  # weights that share a scale, in one row or a square of them; the smallest side of the models is a multiple


def quantise(folder: Path, copy: Path, kind: str, cls: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the folder `copy`: a checkpoint of a model class, quantised; its other weights are stored in `dtype`."""
    shutil.copytree(folder, copy)
    if kind in _BY_TRANSFORMERS:
        model = cls.from_pretrained(folder, dtype=dtype, quantization_config=_BY_TRANSFORMERS[kind](), device_map="cpu")
        model.save_pretrained(copy)
        return copy
    write, settings = _BY_HAND[kind]
    path = copy / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    for name, weight in list(weights.items()):
        if ".layers." in name and "vis" not in name and weight.dim() == 2:
            del weights[name]
            weights |= {name.removesuffix("weight") + suffix: value for suffix, value in write(weight.float()).items()}
    save_file(weights, path, {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": str(dtype).removeprefix("torch.")}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _bitsandbytes(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _squares(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8, a scale for every square."""
    down, across = (side // GROUP for side in weight.shape)
    squares = weight.reshape(down, GROUP, across, GROUP)
    scale = squares.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    low = (squares / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {"weight": low, "weight_scale_inv": scale}


def _rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8, a scale for every row."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four bits, a scale for every group; eight numbers from -8 on are an int32, the first in its lowest bits."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7
    numbers = (groups / scale[..., None]).round().clamp(-8, 7).long() + 8
    packed = (numbers << (4 * torch.arange(8))).sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision.*", "re:.*visual.*", "re:.*projector.*"],
        "config_groups": {"group_0": group},
    }


_EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}
_FOUR = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
_BY_TRANSFORMERS = {
    "bitsandbytes 4": lambda: _bitsandbytes(4),
    "bitsandbytes 8": lambda: _bitsandbytes(8),
    "torchao int8": _torchao,
}
_BY_HAND = {
    "fp8": (
        _squares,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
            "modules_to_not_convert": ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.visual"],
        },
    ),
    "compressed-tensors fp8": (
        _rows,
        _compressed(
            "float-quantized",
            _EIGHT | {"strategy": "channel", "dynamic": False},
            _EIGHT | {"strategy": "token", "dynamic": True},
        ),
    ),
    "compressed-tensors int4": (_packed, _compressed("pack-quantized", _FOUR, None)),
}
KINDS = [*_BY_TRANSFORMERS, *_BY_HAND]
