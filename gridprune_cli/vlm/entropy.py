"""How much there is to tell of a picture around each visual token: the entropy of its grey levels."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from gridprune_cli.pruning.signals import View

_LEVELS = 256


def grey_entropy(picture: Image, views: Sequence[View]) -> Tensor:
    """`-sum_g p_g log2 p_g` (N,) float32 of the grey levels g in each token's rectangle of the picture, in bits.

    A rectangle is cut to whole pixels, at least one, and what of it lies outside of the picture counts for nothing:
    0 where that is all of it, as in padding.
    """
    grey = np.asarray(picture.convert("L"))  # (H, W)
    entropies = []
    for view in views:
        left, top, right, bottom = view.box
        across = _bounds(left, right, view.cols, grey.shape[1])
        down = _bounds(top, bottom, view.rows, grey.shape[0])
        for start_row, end_row in down:
            for start, end in across:
                counts = np.bincount(grey[start_row:end_row, start:end].ravel(), minlength=_LEVELS)
                shares = counts[counts > 0] / max(1, counts.sum())
                entropies.append(-(shares * np.log2(shares)).sum() + 0.0)  # 0.0 turns -0 round
    return torch.tensor(np.array(entropies), dtype=torch.float32)


def _bounds(low: float, high: float, count: int, size: int) -> list[tuple[int, int]]:
    """First pixel and the one behind the last, of each of `count` equal parts of a side of `size` pixels from `low` to
    `high`, in fractions of it; empty outside of the picture."""
    bounds = []
    for i in range(count):
        start, end = (low + (high - low) * step / count for step in (i, i + 1))
        first = round(start * size)
        last = max(first + 1, round(end * size))
        bounds.append((min(max(first, 0), size), min(max(last, 0), size)))
    return bounds
