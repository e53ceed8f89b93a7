"""Attention weights of one layer, without eager attention anywhere.

An attention function registered with transformers computes sdpa as ever, and for a layer that is being watched also
what pruning wants to know. Models need not be patched, and layers that nobody watches pay nothing. Towers and language
models go through it; where a language model has been set to eager attention, its own weights are read.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gridprune_cli.pruning.signals import TOWER_SIGNALS

Combination = Literal["mean", "max"]

NAME = "sdpa_watched"
ATTRIBUTES = "gridprune_"  # what the attributes begin with by which a module is watched
MIDDLE = 9 / 24  # of a tower's layers: the 9th of 24, which HiPrune (arXiv 2508.00553) takes of LLaVA-1.5's
_MAX_SCORES = 1 << 26  # attention scores held at a time, 256 MiB: a batch of large pictures' would not fit


def _watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    for record, cls in getattr(module, "gridprune_records", ()):
        queries = query[:, :, :1] if cls else query
        total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
        step = max(1, _MAX_SCORES // (key.shape[0] * key.shape[1] * key.shape[2]))  # queries
        for start in range(0, queries.shape[2], step):
            chunk = queries[:, :, start : start + step]
            # a matrix product with one row is rounded by what else is in the batch, which must not change an image's
            product = (chunk * key).sum(-1)[:, :, None] if cls else chunk @ key.transpose(-1, -2)
            scores = (product * kwargs["scaling"]).float()
            if attention_mask is not None:  # true where a query may look
                scores = scores.masked_fill(~attention_mask[:, :, start : start + chunk.shape[2]], -torch.inf)
            total += scores.softmax(-1).mean(1).sum(1)
        record.append(total / queries.shape[2])
    weighted: list[Tensor] | None = getattr(module, "gridprune_weighted", None)
    if weighted is not None:
        weighted.append(_queries_attention(module, query, key, attention_mask, kwargs["scaling"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _queries_attention(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of the watched queries to each key `(B, keys)`, float32, combined as `watch_queries` was told."""
    weight, heads, queries = module.gridprune_weight, module.gridprune_heads, module.gridprune_queries
    count, places = key.shape[2], weight.any(0).nonzero()[:, 0]
    first = count - query.shape[2]  # keys before the first query, which come from the cache
    total = key.new_zeros(key.shape[0], count, dtype=torch.float32)
    step = max(1, _MAX_SCORES // (query.shape[0] * query.shape[1] * count))  # queries
    for chunk in places.split(step):
        # heads may share a key: (B, shared, heads per key * q, C)
        grouped = query[:, :, chunk].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        scores = (grouped @ key.transpose(-1, -2) * scaling).float().unflatten(2, (-1, len(chunk)))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None, chunk], -torch.inf)
        elif module.is_causal:
            ahead = torch.arange(count, device=chunk.device) > first + chunk[:, None]
            scores = scores.masked_fill(ahead, -torch.inf)
        attention = _over_heads(scores.softmax(-1).flatten(1, 2), heads)
        total = _over_queries(total, attention, weight[:, chunk], queries)
    return total


def _over_heads(attention: Tensor, heads: Combination) -> Tensor:
    """`(B, q, keys)` of the attention `(B, heads, q, keys)`."""
    return attention.amax(1) if heads == "max" else attention.mean(1)


def _over_queries(total: Tensor, attention: Tensor, weight: Tensor, queries: Combination) -> Tensor:
    """`total` `(B, keys)`, with the attention of further queries `(B, q, keys)` and their weights `(B, q)`.

    Queries of weight 0 don't count, also where their attention is not finite, as that of padding.
    """
    weighted = attention.masked_fill(weight[..., None] == 0, 0) * weight[..., None]
    return torch.maximum(total, weighted.amax(1)) if queries == "max" else total + weighted.sum(1)


AttentionInterface.register(NAME, _watched)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of its own the model would get no mask


@contextmanager
def watch(attention: nn.Module, *, cls: bool) -> Iterator[list[Tensor]]:
    """Records attention to each key `(B, keys)`, float32, mean over heads, at each call of one attention module.

    `cls`: that of the first query alone, the CLS token; else the mean over all queries, attention received. The model
    must have been loaded with the attention implementation `NAME`. A module may be watched in both ways at once.
    """
    record: list[Tensor] = []
    others: tuple[tuple[list[Tensor], bool], ...] = getattr(attention, "gridprune_records", ())
    attention.gridprune_records = (*others, (record, cls))  # type: ignore[assignment]
    try:
        yield record
    finally:
        attention.gridprune_records = others  # type: ignore[assignment]


def middle_layer(layers: Sequence[int], depth: int) -> int:
    """Of the layers of a tower of `depth` layers that attend to the whole picture, the one nearest to `MIDDLE`."""
    return min(layers, key=lambda layer: (abs(layer - (floor(MIDDLE * depth + 0.5) - 1)), layer))


@contextmanager
def watch_tower(
    last: nn.Module, middle: nn.Module, *, cls: bool, optional: Collection[str]
) -> Iterator[list[list[Tensor]]]:
    """Watches the attention modules of a tower for its saliency, and for the optional signals of `TOWER_SIGNALS`.

    `last` is that of the layer whose features are stored, and saliency is what its CLS token attends to, or with `cls`
    False all of its tokens; `middle` is that of the middle layer. `stack_records` makes a tensor of what is recorded.
    """
    modules = {"received_attention": last, "middle_attention": middle}
    with ExitStack() as stack:
        records = [stack.enter_context(watch(last, cls=cls))]
        records += [stack.enter_context(watch(modules[name], cls=False)) for name in TOWER_SIGNALS if name in optional]
        yield records


def stack_records(records: Sequence[Sequence[Tensor]]) -> Tensor:
    """`(B, keys, 1 + M)` of what `watch_tower` recorded: saliency, then the M optional signals, float32."""
    return torch.stack([torch.cat(list(record)) for record in records], dim=-1)


def each_signal(function: Callable[[Tensor], Tensor], attention: Tensor) -> Tensor:
    """A function of one signal's values at the patches, of each in `(..., 1 + M)`: none depends on which others are."""
    return torch.stack([function(signal.contiguous()) for signal in attention.unbind(-1)], dim=-1)


def split_signals(attention: Tensor, optional: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Saliency `(N,)`, and the optional signals by name, `(N,)` each, of tokens' attention `(N, 1 + M)`."""
    names = [name for name in TOWER_SIGNALS if name in optional]
    saliency, *others = (values.contiguous() for values in attention.unbind(-1))
    return saliency, dict(zip(names, others, strict=True))


@contextmanager
def watch_queries(
    attention: nn.Module, weight: Tensor, heads: Combination = "mean", queries: Combination = "mean"
) -> Iterator[list[Tensor]]:
    """Records queries' attention to each key `(B, keys)`, float32, at each call of an attention module.

    `heads` says whether it is the mean over heads, or that of the head that attends most. Over the queries it is summed
    by `weight` `(B, queries)`, float32, on the device of the module, or the largest of the attentions times their
    weights. Queries are those of the call, keys also those of the cache. The language model must run with the attention
    implementation `NAME`, or eager.
    """
    record: list[Tensor] = []
    if attention.config._attn_implementation == "eager":  # type: ignore[union-attr]

        def read(_module: nn.Module, _args: Any, out: tuple[Tensor, Tensor]) -> None:
            places = weight.any(0).nonzero()[:, 0]
            combined = _over_heads(out[1][:, :, places].float(), heads)
            total = combined.new_zeros(combined.shape[0], combined.shape[2])
            record.append(_over_queries(total, combined, weight[:, places], queries))

        handle = attention.register_forward_hook(read)
        try:
            yield record
        finally:
            handle.remove()
    else:
        attention.gridprune_weighted, attention.gridprune_weight = record, weight  # type: ignore[assignment]
        attention.gridprune_heads, attention.gridprune_queries = heads, queries  # type: ignore[assignment]
        try:
            yield record
        finally:
            del attention.gridprune_weighted, attention.gridprune_weight
            del attention.gridprune_heads, attention.gridprune_queries
