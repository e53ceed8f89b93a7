"""The InternVL family against transformers itself: what its tokens are, how salient, and where they lie."""

import json

import pytest
import torch
from PIL import Image
from tiny_families.internvl import write
from torch.nn.functional import avg_pool2d
from transformers import InternVLForConditionalGeneration

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm.internvl import join

WHOLE = (0, 0, 1, 1)
SIZES = {"square": (100, 100), "wide": (210, 70), "tall": (60, 200), "tiny": (31, 29), "odd": (157, 101)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("internvl"))


def whole_eager(kind, folder):
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def pool(attention, side):
    """(T, P) attention to patches as (N,), the mean over blocks of side x side."""
    across = round(attention.shape[1] ** 0.5)
    return avg_pool2d(attention.reshape(-1, 1, across, across), side).flatten()


def test_join_takes_each_block_of_patches():
    patches = torch.randn(2, 36, 5)
    joined = join(patches, 3)
    assert joined.shape == (2, 4, 45)
    for row in range(2):
        for col in range(2):
            block = [patches[:, 6 * (3 * row + y) + 3 * col + x] for y in range(3) for x in range(3)]
            assert torch.equal(joined[:, 2 * row + col], torch.cat(block, -1))


@pytest.mark.parametrize("layer", [-1, -2])
def test_signals_equal_an_eager_reference(tmp_path, noise, layer):
    folder = write(tmp_path, layer)
    model = whole_eager(InternVLForConditionalGeneration, folder)
    family = Pipeline(str(folder), dtype="float32").family
    for size in SIZES.values():
        picture = noise(size).image
        (encoding,) = family.encode([picture])
        pixels = family.process(picture)[0]["pixel_values"]
        with torch.no_grad():
            out = model.model.get_image_features(pixels, output_attentions=True)
        assert torch.allclose(family.project(encoding.vision_features), out.pooler_output.flatten(0, 1), atol=1e-5)
        reference = pool(out.attentions[layer][:, :, 0, 1:].mean(1), 2)  # what CLS looks at
        assert torch.allclose(encoding.saliency, reference, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((100, 100), [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1), WHOLE]),
        ((210, 70), [(0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1), WHOLE]),
        ((60, 200), [(0, 0, 1, 1 / 3), (0, 1 / 3, 1, 2 / 3), (0, 2 / 3, 1, 1), WHOLE]),
        ((31, 29), [WHOLE]),
    ],
)
def test_views_are_the_tiles_then_the_thumbnail(folder, noise, size, boxes):
    views = Pipeline(str(folder)).encoder.encode([noise(size)])[0].views
    assert [view.box for view in views] == [pytest.approx(box) for box in boxes]
    assert all((view.rows, view.cols) == (2, 2) for view in views)


@pytest.mark.parametrize("size", SIZES)
def test_a_token_covers_its_place_in_the_picture(folder, size):
    family = Pipeline(str(folder), dtype="float32").family
    model = family.load("tower").model

    def embed(pixels):
        """Patches of tiles before any of them looks at another, joined by the model itself."""
        patches = model.vision_tower.embeddings(pixels)[:, 1:]
        return model.pixel_shuffle(patches.reshape(len(pixels), 4, 4, -1)).flatten(1, 2)

    check_places(family, embed, SIZES[size])


def test_the_processor_s_chat_template_goes_before_the_tokenizer_s(tmp_path):
    """In older checkpoints they lie in files of their own, and the tokenizer's knows no images."""
    folder = write(tmp_path)
    (folder / "chat_template.jinja").rename(tmp_path / "moved")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (tmp_path / "moved").read_text()}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "no image"}))
    assert Pipeline(str(folder)).family.write_text("What?", 2, None).count("<IMG_CONTEXT>") == 2


def check_places(family, embed, size):
    """Whichever token's place in the picture changes, that token changes most of all in its view.

    `embed` gives (T, N / T, C) for tiles (T, 3, H, W), without attention.
    """
    before = Image.new("RGB", size, (90, 90, 90))
    (encoding,) = family.encode([before])
    with torch.no_grad():
        plain = embed(family.process(before)[0]["pixel_values"].flatten(0, -4))
        for index, view in enumerate(encoding.views):
            left, top, right, bottom = view.box
            for token in range(view.count):
                row, col = divmod(token, view.cols)
                x = left + (right - left) * (col + 0.5) / view.cols  # the token's middle, in fractions
                y = top + (bottom - top) * (row + 0.5) / view.rows
                half = [max(1, side * extent / 4) for side, extent in zip(size, cell(view), strict=True)]
                x0, y0 = round(x * size[0] - half[0]), round(y * size[1] - half[1])
                after = before.copy()
                after.paste((255, 0, 0), (x0, y0, x0 + round(2 * half[0]), y0 + round(2 * half[1])))
                changed = embed(family.process(after)[0]["pixel_values"].flatten(0, -4))
                change = (changed - plain).abs().sum(-1)[index]
                assert change.argmax() == token, (index, token)
                assert change[token] > 2 * change.sum() / 3


def cell(view):
    """Width and height of a token in fractions of the picture."""
    left, top, right, bottom = view.box
    return (right - left) / view.cols, (bottom - top) / view.rows
