"""LLaVA-OneVision: its signals and its geometry, against eager attention, packing and shrinking by hand."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from test_llava_next import QUESTION, SIDE, check_embeds, check_spots, mosaic, open_tiny, seen

from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import GridpruneError
from gridprune_cli.evaluation.data import read_jsonl
from gridprune_cli.evaluation.run import Cell, Plan, answers
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning, Request

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
    base, tiles = tiny.pipeline.encoder.encode([noise(size)])[0].views
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
    vision_features, attention = seen(tiny.whole, inputs["pixel_values"][0], -1)
    with torch.no_grad():
        rows = tiny.whole.model.multi_modal_projector(vision_features)
    saliency = attention.mean((1, 2))[..., None]  # received, over heads and queries

    def packed(values):
        return torch.cat([values[0], shrunk(mosaic(values[1:], shape, size)).flatten(0, 1)])

    encoded = tiny.pipeline.encoder.encode([picture])[0]
    assert torch.allclose(encoded.vision_features, packed(rows), atol=1e-4)
    assert torch.allclose(encoded.saliency, packed(saliency)[:, 0], atol=1e-6)
    question_embeds = tiny.pipeline.family.processor.tokenizer(
        QUESTION, add_special_tokens=False, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        question_embeds = tiny.whole.get_input_embeddings()(question_embeds[0])
    expected = torch.cosine_similarity(packed(rows)[:, None], question_embeds[None], dim=-1).mean(1)
    assert torch.allclose(tiny.pipeline.family.vocabulary(encoded.vision_features, QUESTION), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 50), (224, 224), (210, 70), (60, 200), (31, 29), (900, 4)])
def test_embeds_and_newlines_are_the_models_own(tiny, noise, size):
    check_embeds(tiny, noise(size))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 50), (0, -0.5, 1, 1.5)),
        ((70, 210), (-1, 0, 2, 1)),
        ((112, 112), (0, 0, 1, 1)),
        ((31, 28), (0, -1 / 28, 1, 30 / 28)),  # a line of padding above, two below
    ],
)
def test_one_of_several_is_a_base_view_of_the_padded_picture(tiny, noise, size, box):
    pictures = [noise(size), noise((60, 90), seed=1)]
    images = [picture.image for picture in pictures]
    pixels = tiny.pipeline.family.processor.image_processor([images], return_tensors="pt")["pixel_values"]
    vision_features, attention = seen(tiny.whole, pixels[:, 0], -1)
    with torch.no_grad():
        rows = tiny.whole.model.multi_modal_projector(vision_features)
    encoded = tiny.pipeline.encoder.encode(pictures, several=True)
    for n, one in enumerate(encoded):
        assert [(view.rows, view.cols) for view in one.views] == [(SIDE, SIDE)]
        assert one.placeholder_map.tolist() == [*range(SIDE * SIDE), -1]  # and the newline
        assert torch.allclose(one.vision_features, rows[n], atol=1e-4)
        assert torch.allclose(one.saliency, attention[n].mean((0, 1)), atol=1e-6)
    assert encoded[0].views[0].box == pytest.approx(box)


def test_what_is_encoded_alone_is_not_taken_for_one_of_several(tiny, noise, tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for n, path in enumerate(paths):
        noise((210, 70), seed=n).image.save(path)
    pipeline = tiny.pipeline
    alone, several = (pipeline.encoder.identity(several=several) for several in (False, True))
    assert alone != several and pipeline.encoder.identity() == alone
    pipeline.encoder.store = open_store(tmp_path / "cache")
    try:
        pruning = Pruning(keep=0.5)
        requests = [Request((paths[0],), QUESTION, pruning), Request(tuple(paths), QUESTION, pruning)]
        replies = list(pipeline.runner().answer([*requests, replace(requests[0], question="Which?")], max_new_tokens=6))
        assert not any(isinstance(reply, GridpruneError) for reply in replies)
        assert len(list(pipeline.store.entries())) == 3
        for request, reply in zip(requests, replies, strict=False):
            answer = pipeline.ask(list(request.images), QUESTION, pruning, max_new_tokens=6)
            assert (answer.text, answer.hit, reply.hit) == (reply.text, True, False)
    finally:
        pipeline.encoder.store = None


def test_an_evaluation_asks_of_one_image_and_of_several_as_ask_does(tiny, noise, tmp_path):
    """An image that one question has alone and another beside a second one is encoded in both ways."""
    for n in range(2):
        noise((100, 60), n).image.save(tmp_path / f"{n}.png")
    images = ["0.png", ["0.png", "1.png"]]
    lines = [{"image": image, "question": QUESTION, "answers": ["yes"], "id": n} for n, image in enumerate(images)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = read_jsonl(tmp_path / "lines.jsonl")
    pruning = Pruning(keep=0.5, method=make_method("uniform"))
    plan = Plan(data, (Cell("uniform", pruning),), max_new_tokens=4)
    results = [line for batch in answers(tiny.pipeline, plan, {}) for line in batch if line["cell"] == "uniform"]
    assert len(results) == 2
    for line, paths in zip(results, ([tmp_path / "0.png"], [tmp_path / "0.png", tmp_path / "1.png"]), strict=True):
        asked = tiny.pipeline.ask(paths, QUESTION, pruning, max_new_tokens=4)
        assert (line["answer"], line["tokens"]) == (asked.text, asked.pruned.count)
