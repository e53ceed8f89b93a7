"""LLaVA-OneVision: its signals and its geometry, against eager attention, packing and shrinking by hand."""

from itertools import product

import pytest
import torch
from test_llava_next import QUESTION, SIDE, check_rows, check_spots, mosaic, open_tiny, seen

TILES = 2  # mosaics of much more than so many are shrunk to about as many


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return open_tiny("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))


def shrunk(grid):
    """A grid `(rows, cols, C)` sampled at the middles of a coarser one, each from its four nearest patches."""
    rows, cols, _ = grid.shape
    ratio = (rows * cols / (TILES * SIDE * SIDE)) ** 0.5
    if ratio <= 1.1:
        return grid

    def near(fine, coarse):
        """Per coarse patch: ((index, weight), (index, weight)) along one side."""
        places = [(i + 0.5) * fine / coarse - 0.5 for i in range(coarse)]
        return [((int(p), 1 - p % 1), (min(int(p) + 1, fine - 1), p % 1)) for p in places]

    down, across = near(rows, int(rows // ratio)), near(cols, int(cols // ratio))
    return torch.stack(
        [torch.stack([sum(a * b * grid[i, j] for (i, a), (j, b) in product(v, h)) for h in across]) for v in down]
    )


# width and height of a picture, its tiles (down, across), rows and columns of its mosaic, and where that lies
CASES = [
    ((100, 50), (1, 2), (4, 8), (0, 0, 1, 1)),  # not shrunk
    ((112, 112), (2, 2), (5, 5), (0, 0, 1, 1)),
    ((224, 224), (4, 4), (5, 5), (0, 0, 1, 1)),  # more tiles than go through the tower at a time
    ((210, 70), (2, 4), (3, 9), (0, (14 - 18) / 75, 1, (98 - 18) / 75)),
    ((100, 70), (2, 2), (4, 6), (0, (14 - 16) / 79, 1, (98 - 16) / 79)),
    ((31, 29), (1, 1), (4, 4), (0, -1 / 53, 1, 55 / 53)),
]
NAMES = {"ids": lambda value: "x".join(map(str, value[:2]))}


@pytest.mark.parametrize(("size", "shape", "grid", "box"), CASES, **NAMES)
def test_views_lie_on_the_picture(tiny, noise, size, shape, grid, box):
    base, tiles = tiny.pipeline.encode([noise(size)])[0].views
    assert (base.rows, base.cols, base.box) == (SIDE, SIDE, (0, 0, 1, 1))
    assert (tiles.rows, tiles.cols) == grid
    assert tiles.box == pytest.approx(box)


@pytest.mark.parametrize("size", [(100, 50), (224, 224), (210, 70), (100, 70), (60, 200), (31, 29)])
def test_a_token_covers_its_place_in_the_picture(tiny, size):
    check_spots(tiny, size)


@pytest.mark.parametrize(("size", "shape", "grid", "box"), CASES, **NAMES)
def test_signals_equal_an_eager_reference(tiny, noise, size, shape, grid, box):
    picture = noise(size)
    inputs = tiny.pipeline.family.processor.image_processor([picture.image], return_tensors="pt")
    states, attention = seen(tiny.whole, inputs["pixel_values"][0], -1)
    with torch.no_grad():
        rows = tiny.whole.model.multi_modal_projector(states)
    saliency = attention.mean((1, 2))[..., None]  # received, over heads and queries

    def packed(values):
        return torch.cat([values[0], shrunk(mosaic(values[1:], shape, size)).flatten(0, 1)])

    encoded = tiny.pipeline.encode([picture])[0]
    assert torch.allclose(encoded.states, packed(rows), atol=1e-4)
    assert torch.allclose(encoded.saliency, packed(saliency)[:, 0], atol=1e-6)
    words = tiny.pipeline.family.processor.tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        words = tiny.whole.get_input_embeddings()(words[0])
    expected = torch.cosine_similarity(packed(rows)[:, None], words[None], dim=-1).mean(1)
    assert torch.allclose(tiny.pipeline.family.relevance(encoded.states, QUESTION), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 50), (224, 224), (210, 70), (60, 200), (31, 29), (900, 4)])
def test_rows_and_newlines_are_the_models_own(tiny, noise, size):
    check_rows(tiny, noise(size))
