"""The Idefics3 and SmolVLM families against transformers: what their tokens are, how salient, and where they lie."""

import re

import pytest
import torch
from test_internvl import SIZES, WHOLE, check_places, pool, whole_eager
from tiny_families import open_family


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def family(request, checkpoint):
    return open_family(checkpoint(request.param))


def test_signals_equal_an_eager_reference(family, noise):
    model = whole_eager(type(family).model_class, family.checkpoint.folder)
    for size in SIZES.values():
        picture = noise(size).image
        (encoding,) = family.encode([picture])
        inputs, _ = family.process(picture)
        assert bool((inputs["pixel_attention_mask"] == 1).all())  # of one picture, no tile is padded
        with torch.no_grad():
            out = model.model.get_image_features(
                inputs["pixel_values"], inputs["pixel_attention_mask"], output_attentions=True
            )
        assert torch.allclose(family.project(encoding.vision_features), out.pooler_output[0], atol=1e-5)
        reference = pool(out.attentions[-1].mean((1, 2)), family.side)  # what each patch is looked at
        assert torch.allclose(encoding.saliency, reference, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "rows", "cols"),
    [((100, 100), 4, 4), ((210, 70), 2, 4), ((60, 200), 4, 2), ((31, 29), 4, 4), ((900, 7), 1, 4)],
)
def test_views_are_the_tiles_then_the_whole(family, noise, size, rows, cols):
    """In the order of their tags in the prompt."""
    (encoding,) = family.encode([noise(size).image])
    *tiles, last = encoding.views
    tags = [tuple(map(int, tag)) for tag in re.findall(r"<row_(\d+)_col_(\d+)>", encoding.prompt["placeholder"])]
    assert len(tags) == rows * cols and max(tags) == (rows, cols)
    boxes = [((c - 1) / cols, (r - 1) / rows, c / cols, r / rows) for r, c in tags]
    assert [view.box for view in tiles] == [pytest.approx(box) for box in boxes]
    assert last.box == WHOLE
    assert all((view.rows, view.cols) == (2, 2) for view in encoding.views)


def test_an_unsplit_picture_is_one_view(family, noise, monkeypatch):
    monkeypatch.setattr(family.processor.image_processor, "do_image_splitting", False)
    (encoding,) = family.encode([noise((100, 60)).image])
    assert [view.box for view in encoding.views] == [WHOLE]


@pytest.mark.parametrize("size", SIZES)
def test_a_token_covers_its_place_in_the_picture(family, size):
    model = whole_eager(type(family).model_class, family.checkpoint.folder).model

    def embed(pixels):
        """Patches of tiles before any of them looks at another, joined by the model itself."""
        patches = model.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2).contiguous()
        return model.connector.pixel_shuffle(patches, family.side)

    check_places(family, embed, SIZES[size])
