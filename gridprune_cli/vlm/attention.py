"""Attention weights of one layer, without eager attention anywhere.

An attention function registered with transformers computes sdpa as ever, and for a layer that is being watched also
the softmax of the rows asked for. Models need not be patched, and layers that nobody watches pay nothing.
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


def _watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    record = getattr(module, "gridprune_record", None)
    if record is not None:
        scores = query[:, :, record.rows] @ key.transpose(-1, -2) * kwargs["scaling"]
        record.weights.append(scores.float().softmax(-1).mean(1))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, _watched)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of its own the model would get no mask


class Record:
    """Head-mean attention weights `(B, rows, keys)`, float32, of each call of the watched layer."""

    def __init__(self, rows: slice):
        self.rows = rows
        self.weights: list[Tensor] = []


@contextmanager
def watch(attention: nn.Module, rows: slice) -> Iterator[Record]:
    """Records the softmax rows of one unmasked attention module of a model that was loaded with `NAME`."""
    record = Record(rows)
    attention.gridprune_record = record  # type: ignore[assignment]
    try:
        yield record
    finally:
        del attention.gridprune_record


def cls_saliency(record: Record) -> Tensor:
    """Attention of the CLS token to every patch, `(B, N)`: the CLS row without its own column."""
    return torch.cat(record.weights)[:, 0, 1:]
