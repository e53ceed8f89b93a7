"""The entropy of grey levels around each token, against its definition."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.entropy import grey_entropy


def slow_entropy(levels):
    counts = Counter(levels)
    return -math.fsum(n / len(levels) * math.log2(n / len(levels)) for n in counts.values()) if levels else 0.0


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_each_rectangle_by_itself(width, height, rows, cols, seed):
    box = [(0.0, 0.0, 1.0, 1.0), (-0.4, 0.1, 1.3, 0.8), (0.5, 0.0, 1.0, 0.5)][seed % 3]
    grey = np.random.default_rng(seed).integers(0, 4, (height, width)).astype(np.uint8) * 60
    entropies = grey_entropy(Image.fromarray(grey), [View(1, 1), View(rows, cols, box)])
    expected = [slow_entropy(grey.ravel().tolist())]
    left, top, right, bottom = box
    for row in range(rows):
        for col in range(cols):
            y0, y1 = (round((top + (bottom - top) * n / rows) * height) for n in (row, row + 1))
            x0, x1 = (round((left + (right - left) * n / cols) * width) for n in (col, col + 1))
            inside = [
                int(grey[i, j])
                for i in range(y0, max(y0 + 1, y1))
                for j in range(x0, max(x0 + 1, x1))
                if 0 <= i < height and 0 <= j < width
            ]
            expected.append(slow_entropy(inside))
    assert entropies.tolist() == pytest.approx(expected, abs=1e-6)


def test_colours_count_as_their_grey():
    picture = Image.new("RGB", (8, 4))
    picture.paste((255, 255, 255), (0, 0, 2, 4))
    assert grey_entropy(picture, [View(1, 2)]).tolist() == [1.0, 0.0]  # half white and half black; black alone
