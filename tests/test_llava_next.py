"""LLaVA-NeXT: its signals and its geometry, against eager attention and packing by hand."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_families import write_checkpoint
from transformers import AutoTokenizer, CLIPModel

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.projection import project

QUESTION = "what colour is the left object?"
SIDE, PATCH = 4, 14  # of a tile: patches, and pixels of a patch


def open_tiny(family, folder):
    """A tiny checkpoint: its folder, a pipeline over it, and the whole model with eager attention."""
    write_checkpoint(family, folder)
    pipeline = Pipeline(str(folder), dtype="float32")
    kind = pipeline.family.model_class
    whole = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return SimpleNamespace(folder=folder, pipeline=pipeline, whole=whole)


def seen(whole, pixels, layer):
    """Of tiles: the states and the eager attention (T, heads, queries, keys) of a layer."""
    with torch.no_grad():
        out = whole.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    return out.hidden_states[layer], out.attentions[layer]


def mosaic(tiles, shape, size):
    """Tiles `(T, 16, C)` as one grid `(rows, cols, C)` without padding, patch by patch."""
    tall, wide = shape
    grid = [
        [tiles[(row // SIDE) * wide + col // SIDE, (row % SIDE) * SIDE + col % SIDE] for col in range(wide * SIDE)]
        for row in range(tall * SIDE)
    ]
    width, height = size
    if width / height > wide / tall:  # bars above and below
        bar = (tall * SIDE - int(round(wide * SIDE * height / width, 7))) // 2
        grid = grid[bar : len(grid) - bar]
    else:
        bar = (wide * SIDE - int(round(tall * SIDE * width / height, 7))) // 2
        grid = [row[bar : len(row) - bar] for row in grid]
    return torch.stack([torch.stack(row) for row in grid])


def check_spots(tiny, size):
    """What changes most when the middle of a token's box changes is that token, in both views."""
    family = tiny.pipeline.family
    embed = family.load("tower").model.vision_tower.embeddings

    def run_tower(pixels, optional):
        vision_features = embed(pixels)[:, -SIDE * SIDE :]
        return vision_features, vision_features.abs().mean(-1, keepdim=True)

    before = Image.new("RGB", size, (90, 90, 90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "run_tower", run_tower)
        (plain,) = family.encode([before])
        first, checked = 0, 0
        for view in plain.views:
            left, top, right, bottom = view.box
            wide, tall = (right - left) / view.cols * size[0], (bottom - top) / view.rows * size[1]  # of a token
            for token in range(0, view.count, 3):
                x = left * size[0] + (token % view.cols + 0.5) * wide
                y = top * size[1] + (token // view.cols + 0.5) * tall
                spot = [round(v) for v in (x - wide / 4, y - tall / 4, x + wide / 4, y + tall / 4)]
                if min(spot) < 0 or spot[2] > size[0] or spot[3] > size[1] or spot[0] == spot[2] or spot[1] == spot[3]:
                    continue
                after = before.copy()
                after.paste((255, 0, 0), tuple(spot))
                (changed,) = family.encode([after])
                change = (changed.vision_features - plain.vision_features).norm(dim=-1)[first : first + view.count]
                assert int(change.argmax()) == token, (view, token, spot)
                checked += 1
            first += view.count
    assert checked >= first // 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return open_tiny("llava_next", tmp_path_factory.mktemp("llava_next"))


# width and height of a picture, its tiles (down, across), and where in the picture the mosaic lies
CASES = [
    ((112, 112), (2, 2), (0, 0, 1, 1)),
    ((210, 70), (1, 3), (0, 0, 1, 1)),
    # 112 x 79 pixels of 112 x 112, 16 above; one row of patches is cut off above and below
    ((100, 70), (2, 2), (0, (14 - 16) / 79, 1, (98 - 16) / 79)),
    # 51 x 168 pixels of 56 x 168, 2 on the left; too little for a column
    ((60, 200), (3, 1), (-2 / 51, 0, 54 / 51, 1)),
    # 60 x 56 of 112 x 56, 26 on the left: two columns of patches are cut off on either side, with 2 pixels of it
    ((31, 29), (1, 2), (2 / 60, 0, 58 / 60, 1)),
]


@pytest.mark.parametrize(("size", "shape", "box"), CASES, ids=lambda value: "x".join(map(str, value[:2])))
def test_views_lie_on_the_picture(tiny, noise, size, shape, box):
    base, tiles = tiny.pipeline.encoder.encode([noise(size)])[0].views
    assert (base.rows, base.cols, base.box) == (SIDE, SIDE, (0, 0, 1, 1))
    rows, cols, _ = mosaic(torch.zeros(shape[0] * shape[1], SIDE * SIDE, 1), shape, size).shape
    assert (tiles.rows, tiles.cols) == (rows, cols)
    assert tiles.box == pytest.approx(box)


@pytest.mark.parametrize("size", [(112, 112), (210, 70), (100, 70), (60, 200), (31, 29)])
def test_a_token_covers_its_place_in_the_picture(tiny, size):
    check_spots(tiny, size)


@pytest.mark.parametrize(("size", "shape", "box"), CASES, ids=lambda value: "x".join(map(str, value[:2])))
def test_signals_equal_an_eager_reference(tiny, noise, size, shape, box):
    picture = noise(size)
    inputs = tiny.pipeline.family.processor.image_processor([picture.image], return_tensors="pt")
    vision_features, attention = seen(tiny.whole, inputs["pixel_values"][0], -2)
    vision_features, saliency = vision_features[:, 1:], attention[:, :, 0, 1:].mean(1)[..., None]

    def packed(values):
        return torch.cat([values[0], mosaic(values[1:], shape, size).flatten(0, 1)])

    encoded = tiny.pipeline.encoder.encode([picture])[0]
    assert torch.allclose(encoded.vision_features, packed(vision_features), atol=1e-5)
    assert torch.allclose(encoded.saliency, packed(saliency)[:, 0], atol=1e-6)

    clip = CLIPModel.from_pretrained(tiny.folder / "clip", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "clip")
    ids = [tokenizer.bos_token_id, *tokenizer(QUESTION, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        text = clip.get_text_features(torch.tensor([ids])).pooler_output
        patches = clip.visual_projection(clip.vision_model.post_layernorm(packed(vision_features)))
    relevance = tiny.pipeline.family.relevance(encoded.vision_features, QUESTION)
    assert torch.allclose(relevance, torch.cosine_similarity(patches, text), atol=1e-5)


def check_embeds(tiny, picture):
    """Embeds and separators are those that the model itself makes of the picture. Gives the encoded image back."""
    inputs = tiny.pipeline.family.processor.image_processor([picture.image], return_tensors="pt")
    with torch.no_grad():
        expected = tiny.whole.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    encoded = tiny.pipeline.encoder.encode([picture])[0]
    (embeds,) = project(tiny.pipeline.family, [(encoded.vision_features, encoded.placeholder_map)])
    assert embeds.shape == expected.shape
    assert torch.allclose(embeds, expected, atol=1e-4)
    newlines = (expected == tiny.whole.model.image_newline).all(1)
    assert torch.equal(encoded.placeholder_map < 0, newlines)
    return encoded


@pytest.mark.parametrize("size", [(112, 112), (210, 70), (100, 70), (60, 200), (31, 29)])
def test_embeds_and_newlines_are_the_models_own(tiny, noise, size):
    encoded = check_embeds(tiny, noise(size))
    assert int((encoded.placeholder_map < 0).sum()) == encoded.views[1].rows


def test_a_line_of_a_picture_has_no_mosaic(tiny, noise):
    """Cutting the padding off in whole patches leaves nothing of it."""
    encoded = check_embeds(tiny, noise((400, 4)))
    assert len(encoded.views) == 1 and (encoded.placeholder_map >= 0).all()


@pytest.mark.parametrize("size", [(400, 4), (4, 400)])
def test_all_of_a_line_of_a_picture_is_generate(tiny, noise, size):
    """A tall one's mosaic has rows without tokens; their newlines stay."""
    picture = noise(size)
    pipeline = tiny.pipeline
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = pipeline.family.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = pipeline.family.processor(images=[picture.image], text=[text], return_tensors="pt")
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], QUESTION, Pruning(keep=1.0))
    assert torch.equal(pruned.input_ids, inputs["input_ids"][0])
    expected = tiny.whole.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(pruned.input_ids) :]
    assert generate(pipeline.family, [pruned], 12)[0].ids == tuple(expected.tolist())
