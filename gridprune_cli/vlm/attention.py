"""Attention weights of one layer, without eager attention anywhere.

An attention function registered with transformers computes sdpa as ever, and for a layer that is being watched also
what pruning wants to know. Models need not be patched, and layers that nobody watches pay nothing. Towers and language
models go through it; where a language model has been set to eager attention, its own weights are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_watched"
_MAX_SCORES = 1 << 26  # attention scores held at a time, 256 MiB: a batch of large pictures' would not fit


def _watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    record: list[Tensor] | None = getattr(module, "gridprune_record", None)
    if record is not None:
        queries = query[:, :, :1] if module.gridprune_cls else query
        total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
        step = max(1, _MAX_SCORES // (key.shape[0] * key.shape[1] * key.shape[2]))  # queries
        for start in range(0, queries.shape[2], step):
            chunk = queries[:, :, start : start + step]
            # a matrix product with one row is rounded by what else is in the batch, which must not change an image's
            product = (chunk * key).sum(-1)[:, :, None] if module.gridprune_cls else chunk @ key.transpose(-1, -2)
            scores = (product * kwargs["scaling"]).float()
            if attention_mask is not None:  # true where a query may look
                scores = scores.masked_fill(~attention_mask[:, :, start : start + chunk.shape[2]], -torch.inf)
            total += scores.softmax(-1).mean(1).sum(1)
        record.append(total / queries.shape[2])
    weighted: list[Tensor] | None = getattr(module, "gridprune_weighted", None)
    if weighted is not None:
        weighted.append(_weighted_attention(module, query, key, attention_mask, kwargs["scaling"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _weighted_attention(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of the weighted queries to each key `(B, keys)`, float32, mean over heads; heads may share a key."""
    places, count = module.gridprune_weight.any(0).nonzero()[:, 0], key.shape[2]
    queries = query[:, :, places].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (queries @ key.transpose(-1, -2) * scaling).float().unflatten(2, (-1, len(places)))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None, places], -torch.inf)
    elif module.is_causal:
        scores = scores.masked_fill(torch.arange(count, device=places.device) > places[:, None], -torch.inf)
    return _weighted_sum(scores.softmax(-1).mean((1, 2)), module.gridprune_weight[:, places])


def _weighted_sum(attention: Tensor, weight: Tensor) -> Tensor:
    """Sums `(B, keys)` of the attention of queries `(B, q, keys)` by their weights `(B, q)`.

    Queries of weight 0 don't count, also where their attention is not finite, as that of padding.
    """
    return (attention.masked_fill(weight[..., None] == 0, 0) * weight[..., None]).sum(1)


AttentionInterface.register(NAME, _watched)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of its own the model would get no mask


@contextmanager
def watch(attention: nn.Module, *, cls: bool) -> Iterator[list[Tensor]]:
    """Records attention to each key `(B, keys)`, float32, mean over heads, at each call of one attention module.

    `cls`: that of the first query alone, the CLS token; else the mean over all queries, attention received. The model
    must have been loaded with the attention implementation `NAME`.
    """
    record: list[Tensor] = []
    attention.gridprune_record, attention.gridprune_cls = record, cls  # type: ignore[assignment]
    try:
        yield record
    finally:
        del attention.gridprune_record, attention.gridprune_cls


@contextmanager
def watch_queries(attention: nn.Module, weight: Tensor) -> Iterator[list[Tensor]]:
    """Records queries' attention to each key `(B, keys)`, float32, mean over heads, at each call of a module.

    Summed over the queries of a prompt by `weight` `(B, queries)`, float32, on the device of the module. The language
    model must run with the attention implementation `NAME`, or eager.
    """
    record: list[Tensor] = []
    if attention.config._attn_implementation == "eager":  # type: ignore[union-attr]

        def read(_module: nn.Module, _args: Any, out: tuple[Tensor, Tensor]) -> None:
            places = weight.any(0).nonzero()[:, 0]
            record.append(_weighted_sum(out[1][:, :, places].float().mean(1), weight[:, places]))

        handle = attention.register_forward_hook(read)
        try:
            yield record
        finally:
            handle.remove()
    else:
        attention.gridprune_weighted, attention.gridprune_weight = record, weight  # type: ignore[assignment]
        try:
            yield record
        finally:
            del attention.gridprune_weighted, attention.gridprune_weight
