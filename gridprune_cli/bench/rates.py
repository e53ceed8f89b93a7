"""What a machine reaches with a language model's own matrices: operations and bytes a second."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gridprune_cli.bench.cost import Rates

_TOKENS = 512  # by which a matrix is multiplied for operations: so many that reading it is a small share of the time
_RUNS = 3  # after a first; the best counts, since both are limits


def weight_bytes(layers: list[nn.Linear]) -> float:
    """Bytes of a weight of linear layers, with its share of scales where they are quantised."""
    return sum(count_bytes(layer.weight) for layer in layers) / sum(
        layer.in_features * layer.out_features for layer in layers
    )


@torch.inference_mode()
def measure_rates(layers: list[nn.Linear], dtype: torch.dtype) -> Rates:
    """The rates of a language model's linear layers, as they are: in their dtype, on their device, quantised or not.

    Operations a second are those of the largest of them with `_TOKENS` tokens; bytes a second those of all of them with
    one token each, one after the other, as in decoding, so that they come from memory where they don't fit a cache.
    """
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
    many = _tokens(largest, _TOKENS, dtype)
    ones = {layer.in_features: _tokens(layer, 1, dtype) for layer in layers}

    def read_all() -> None:
        for layer in layers:
            layer(ones[layer.in_features].to(layer.weight.device))

    flops = 2 * _TOKENS * largest.in_features * largest.out_features
    nbytes = sum(count_bytes(layer.weight) for layer in layers)
    return Rates(flops / _best(lambda: largest(many), many), nbytes / _best(read_all, many))


def _best(work: Callable[[], Any], on: Tensor) -> float:
    """Seconds of the fastest of some runs, with what it started on a tensor's GPU done."""
    times = []
    for _ in range(_RUNS + 1):
        start = time.perf_counter()
        work()
        if on.is_cuda:
            torch.cuda.synchronize(on.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _tokens(layer: nn.Linear, count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, count, layer.in_features).to(layer.weight.device, dtype)


def count_bytes(weight: Any) -> int:
    """Bytes of a weight; of one of torchao's, those of the tensors that it consists of."""
    if not hasattr(weight, "tensor_data_names"):
        return weight.numel() * weight.itemsize
    return sum(count_bytes(value) for value in vars(weight).values() if isinstance(value, Tensor))
