"""PaliGemma, and what Gemma 3 shares with it: signals against eager attention, where tokens lie; then its prompt."""

import pytest
import torch
from PIL import Image
from tiny_families import BOS, PAD
from tiny_families.paligemma import inputs
from torch.nn.functional import pad
from transformers import PaliGemmaForConditionalGeneration

from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

SIZES = {"square": (100, 100), "wide": (210, 70), "tall": (60, 200), "tiny": (31, 29)}


@pytest.fixture(scope="module", params=["paligemma", "gemma3"])
def kind(request, checkpoint):
    """(model type, a tiny checkpoint of it)."""
    return request.param, checkpoint(request.param)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("paligemma")


@pytest.fixture
def pipeline(folder):
    return Pipeline(str(folder), dtype="float32")


def averages(patches: torch.Tensor) -> torch.Tensor:
    """(64, C) of 8 x 8 patches to (16, C): token by token, the mean of its square of four."""
    rows = [
        torch.stack([patches[(2 * r + dr) * 8 + 2 * c + dc] for dr in (0, 1) for dc in (0, 1)]).mean(0)
        for r in range(4)
        for c in range(4)
    ]
    return torch.stack(rows)


def tokens(name: str, patches: torch.Tensor) -> torch.Tensor:
    """Visual tokens (16, C) of the tower's patches."""
    return averages(patches) if name == "gemma3" else patches


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_signals_equal_an_eager_reference(kind, noise, size):
    name, folder = kind
    pipeline, picture = Pipeline(str(folder), dtype="float32"), noise(size)
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    whole = pipeline.family.model_class.from_pretrained(folder, **eager).eval()
    pixels = pipeline.family.processor.image_processor(picture.image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tower = whole.model.vision_tower(pixels, output_attentions=True)
        rows = whole.model.get_image_features(pixels).pooler_output[0]
    encoded = pipeline.encoder.encode([picture])[0]
    received = tower.attentions[-1][0].mean((0, 1))  # over heads and queries
    assert torch.allclose(encoded.vision_features, tokens(name, tower.last_hidden_state[0]), atol=1e-5)
    assert torch.allclose(encoded.saliency, tokens(name, received[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(pipeline.family.project(encoded.vision_features), rows, atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_token_covers_its_place_in_the_picture(kind, size):
    """What changes when one cell of the picture changes is most of all the token of that cell."""
    name, folder = kind
    pipeline, before = Pipeline(str(folder), dtype="float32"), Image.new("RGB", size, (90, 90, 90))
    (view,) = pipeline.family.encode([before])[0].views
    assert (view.rows, view.cols, view.box) == (4, 4, (0.0, 0.0, 1.0, 1.0))
    tower = pipeline.family.load("tower").model.vision_tower
    for row, col in ((0, 0), (2, 1), (1, 3)):
        after = before.copy()
        cell = zip((col, row, col + 1, row + 1), size * 2, strict=True)
        after.paste((255, 0, 0), tuple(round(quarters / 4 * side) for quarters, side in cell))
        pixels = [pipeline.family.process(picture)[0]["pixel_values"] for picture in (before, after)]
        with torch.no_grad():
            change = (tower.embeddings(pixels[1]) - tower.embeddings(pixels[0]))[0]
        assert tokens(name, change).abs().sum(-1).argmax() == row * 4 + col


def test_a_batch_of_pictures_is_each_picture(pipeline, noise):
    pictures = [noise(size).image for size in SIZES.values()]
    for picture, together in zip(pictures, pipeline.family.encode(pictures), strict=True):
        alone = pipeline.family.encode([picture])[0]
        assert torch.allclose(together.vision_features, alone.vision_features, atol=1e-5)
        assert torch.allclose(together.saliency, alone.saliency, atol=1e-6)


def test_images_come_before_the_beginning_of_the_text(pipeline, noise):
    images = [pipeline.encoder.encode([noise((60, 60), seed)])[0] for seed in range(2)]
    ids = pipeline.family.write_prompt("what is red?", images)
    assert (ids[:32] == pipeline.family.image_token).all()
    assert ids[32] == BOS and int((ids == BOS).sum()) == 1
    assert pipeline.family.processor.tokenizer.decode(ids[33:]) == "what is red?\n"
    with pytest.raises(BadInput, match="stands for an image"):
        pipeline.family.write_prompt("what is <image>?", images)


def test_the_whole_prompt_is_prefix_in_a_filled_up_batch_too(folder, pipeline, noise):
    """Left padding forces a mask, which would be causal if the model were not told of the prefix."""
    whole = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    picture = noise((100, 80))
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], "what is red?", Pruning(keep=1.0))
    ids = pad(pruned.input_ids[None], (3, 0), value=PAD)
    with torch.no_grad():
        expected = whole(**inputs(pipeline.family.processor, [picture.image], "what is red?")).logits[0, -1]
        logits = pipeline.family.load("language")(
            input_ids=ids,
            attention_mask=(torch.arange(ids.shape[1]) >= 3).long()[None],
            position_ids=pad(pruned.position_ids[None], (3, 0)),
            mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
            **pipeline.family.extras(ids),
        ).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-4)
