"""What the Qwen families share: grids, merged patches, positions in three axes."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.vision_utils import get_vision_window_index

from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.signals import View
from gridprune_cli.settings import Pruning

QUESTION = "what colour is the left object?"
SIZES = {"square": (100, 100), "wide": (240, 90), "tall": (70, 260), "tiny": (31, 29), "large": (900, 700)}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def kind(request, checkpoint):
    """(model type, a tiny checkpoint of it)."""
    return request.param, checkpoint(request.param)


def plain(folder, **options):
    family = Pipeline(str(folder), dtype="float32").family
    return family.model_class.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("size", SIZES)
def test_signals_equal_an_eager_reference(kind, noise, monkeypatch, size):
    """States are transformers' own; saliency is what each token's patches got from all, in the right block."""
    name, folder = kind
    picture = noise(SIZES[size])
    family = Pipeline(str(folder), dtype="float32").family
    (encoding,) = family.encode([picture.image])
    model = plain(folder, attn_implementation="eager")
    visual = model.model.visual
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    eager, seen = module.eager_attention_forward, []

    def spy(layer, *args, **kwargs):
        out = eager(layer, *args, **kwargs)
        if layer is visual.blocks[2 if name == "qwen2_5_vl" else 3].attn:
            seen.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    inputs = family.process(picture.image)[0]
    with torch.no_grad():
        out = model.model.get_image_features(**inputs)
    assert torch.allclose(encoding.vision_features[:, :64], out.pooler_output[0], atol=1e-5)
    (weights,) = seen  # one call: the block looks at the whole picture
    assert weights.shape[2:] == (4 * len(encoding.saliency),) * 2
    order = range(len(encoding.saliency))
    if name == "qwen2_5_vl":
        order = get_vision_window_index(inputs["image_grid_thw"], 2, 56, 14)[0].tolist()
        assert size in ("tiny", "tall") or order != sorted(order)
    expected = torch.empty(len(encoding.saliency))
    for place, token in enumerate(order):
        expected[token] = weights[0, :, :, 4 * place : 4 * place + 4].mean()
    assert torch.allclose(encoding.saliency, expected, atol=1e-6)


@pytest.mark.parametrize("size", ["square", "wide", "tall", "large"])
def test_a_token_covers_its_place_in_the_picture(kind, size):
    """What changes most when one cell of the picture changes is the token whose box holds it."""
    pipeline = Pipeline(str(kind[1]), dtype="float32")
    before = Image.new("RGB", SIZES[size], (90, 90, 90))
    first = pipeline.family.encode([before])[0]
    (view,) = first.views
    assert view.box == (0, 0, 1, 1) and view.count == len(first.vision_features)
    width, height = before.width / view.cols, before.height / view.rows
    assert 2 / 3 < width / height < 3 / 2  # tokens are as good as square
    for row, col in {(0, view.cols - 1), (view.rows // 2, view.cols // 2), (view.rows - 1, 0)}:
        after = before.copy()
        corner = (col * width + width / 4, row * height + height / 4)
        after.paste((255, 0, 0), (*map(round, corner), round(corner[0] + width / 2), round(corner[1] + height / 2)))
        change = (pipeline.family.encode([after])[0].vision_features - first.vision_features).abs().sum(-1)
        assert change.argmax() == row * view.cols + col


@pytest.mark.parametrize("names", [("square",), ("tall", "wide"), ("tiny", "large", "tall")])
def test_positions_are_those_of_transformers(kind, noise, names):
    """By formula, from the prompt and the grids: nothing is loaded for them."""
    folder = kind[1]
    pipeline = Pipeline(str(folder), dtype="float32")
    images = pipeline.encoder.encode([noise(SIZES[name]) for name in names])
    fresh = Pipeline(str(folder), dtype="float32")
    ids = fresh.family.write_prompt(QUESTION, images)
    positions = fresh.family.positions(ids, images)
    grids = torch.tensor([[1, 2 * view.rows, 2 * view.cols] for image in images for view in image.views])
    kinds = (ids == fresh.family.image_token).int()[None]
    expected = plain(folder).model.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grids)[0]
    assert torch.equal(positions, expected[:, 0])
    pruned = fresh.prune(images, QUESTION, Pruning(keep=0.4, method=make_method("fastervlm")))
    assert pruned.position_ids.shape == (3, len(pruned.input_ids))
    assert not fresh.family._loaded


def test_positions_of_images_side_by_side(kind):
    family = Pipeline(str(kind[1]), dtype="float32").family
    image, views = family.image_token, (View(1, 2), View(2, 1))
    ids = torch.tensor([5, image, image, image, image, 6, 7])
    positions = family.positions(ids, [SimpleNamespace(views=(view,)) for view in views])
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5, 6], [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 3, 3, 5, 6]]


def test_one_batch_holds_both_kinds_of_positions(kind, noise):
    pipeline = Pipeline(str(kind[1]), dtype="float32")
    images = pipeline.encoder.encode([noise((100, 100)), noise((60, 200), seed=1)])
    modes = ("original", "compact")
    sets = [
        pipeline.prune(image, QUESTION, Pruning(keep=0.5, positions=mode))
        for image, mode in zip(images, modes, strict=True)
    ]
    assert [pruned.position_ids.dim() for pruned in sets] == [2, 1]
    together = generate(pipeline.family, sets, 6)
    assert [generated.ids for generated in together] == [generate(pipeline.family, [one], 6)[0].ids for one in sets]


def test_several_pictures_encode_as_single_ones(kind, noise):
    family = Pipeline(str(kind[1]), dtype="float32").family
    pictures = [noise(size, seed).image for seed, size in enumerate(SIZES.values())]
    for picture, encoding in zip(pictures, family.encode(pictures), strict=True):
        (alone,) = family.encode([picture])
        assert torch.equal(encoding.vision_features, alone.vision_features) and torch.equal(
            encoding.saliency, alone.saliency
        )


def test_a_strip_is_refused(kind):
    family = Pipeline(str(kind[1]), dtype="float32").family
    with pytest.raises(BadInput, match=r"a picture of 2 x 600: .*aspect ratio"):
        family.encode([Image.new("RGB", (2, 600))])
