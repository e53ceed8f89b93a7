"""`quantize`: the weights of a language model's linear layers in 8 or 4 bits, put there by torchao as they are read.

Weights only: what goes through the layers stays in the model's dtype, and so do embeddings, head, norms, the tower, the
projector and a CLIP. A scale belongs to each row in 8 bits, a scale and a zero point to each group of a row in 4.
"""

import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.vlm.placement import Placement

BITS = {"int8": 8, "int4": 4}
_GROUPS = (128, 64, 32)  # weights that share a scale in 4 bits, as torch's kernels take them; the larger the smaller
_TINYGEMM = (8, 0)  # the compute capability from which torch's 4-bit kernel runs on a GPU


def check_quantize(quantize: str | None, placed: Placement) -> None:
    """Raises BadInput where weights can't be quantised so, for want of a package, or by the device or dtype.

    In 4 bits torch has kernels for bfloat16. On a CPU it takes other dtypes, a hundred times slower.
    """
    if quantize is None:
        return
    if quantize not in BITS:
        raise BadInput(f"not one of {', '.join(BITS)}", field="quantize", value=quantize)
    missing = [name for name in ("torchao", "accelerate") if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} missing; pip install 'gridprune[quantize]'"
        raise BadInput(reason, field="quantize", value=quantize)
    if placed.sharded:
        raise BadInput("not with `device=map`; name one device", field="quantize", value=quantize)
    kind = placed.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BadInput(f"on a CPU or a CUDA device, not on {kind}", field="quantize", value=quantize)
    if quantize == "int4" and placed.dtype != torch.bfloat16:
        dtype = str(placed.dtype).removeprefix("torch.")
        reason = f"computes in bfloat16 alone, and the dtype is {dtype}; add `dtype=bfloat16`, or take `quantize=int8`"
        raise BadInput(reason, field="quantize", value=quantize)
    if quantize == "int4" and kind == "cuda" and torch.cuda.get_device_capability(placed.device) < _TINYGEMM:
        raise BadInput("needs a GPU of compute capability 8.0; take `quantize=int8`", field="quantize", value=quantize)


def torchao_config(quantize: str, device: str, config: Any) -> Any:
    """What torchao is told: how to quantise the layers of a model with a config of transformers.

    Raises BadInput where the widths of the language model are no multiples of a group.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if quantize == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    group = group_size(config)
    if device == "cpu":  # torchao's own format for torch's kernel of CPUs
        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


def group_size(config: Any) -> int:
    """How many weights of a row share a scale in 4 bits: the largest group that divides the width of every layer.

    Raises BadInput where none does.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    widths = (text.hidden_size, text.intermediate_size, heads * head_width)
    for group in _GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    reason = f"widths of {', '.join(map(str, widths))} are no multiples of {_GROUPS[-1]}; take `quantize=int8`"
    raise BadInput(reason, field="quantize", value="int4")


def loading_config(quantize: str, device: str, config: Any, text_model: str) -> Any:
    """The config by which transformers quantises the linear layers below a dotted path while it reads them."""
    from transformers import TorchAoConfig

    elsewhere = rf"(?!{re.escape(text_model)}\.).*"
    return TorchAoConfig(torchao_config(quantize, device, config), modules_to_not_convert=[elsewhere])


def quantize_module(module: nn.Module, quantize: str | None, device: str, config: Any) -> None:
    """Quantises the weights of a linear layer, in place; None leaves them as they are."""
    if quantize:
        from torchao.quantization import quantize_

        quantize_(module, torchao_config(quantize, device, config), filter_fn=None)


def linear_layers(model: nn.Module, text_model: str) -> dict[str, nn.Linear]:
    """The linear layers below the dotted path of a model's language model, by their whole dotted paths."""
    below = model.get_submodule(text_model).named_modules(prefix=text_model)
    return {path: module for path, module in below if isinstance(module, nn.Linear)}


def check_quantized(model: nn.Module, text_model: str) -> None:
    """Raises GridpruneError where torchao left a linear layer of the language model as it was."""
    from torchao.utils import TorchAOBaseTensor

    layers = linear_layers(model, text_model)
    for path, layer in layers.items():
        if not isinstance(layer.weight, TorchAOBaseTensor):
            shape = " x ".join(map(str, layer.weight.shape))
            raise GridpruneError(f"torchao does not quantise its {path} of {shape}; leave `quantize` out")


def quantized_bytes(weights: int, quantize: str | None, itemsize: int, group: int) -> int:
    """Bytes of `weights` numbers in linear layers: in 4 bits with a scale and a zero point of bfloat16 a group.

    The scales of 8 bits, one a row, are left out: below a thousandth.
    """
    if quantize is None:
        return weights * itemsize
    return weights if quantize == "int8" else weights // 2 + 4 * (weights // group)
