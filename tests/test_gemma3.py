"""Gemma 3 in particular: its signals against eager attention, where its tokens lie, and what the model is told."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_families import BOS, PAD, make
from tiny_families.gemma3 import inputs
from transformers import Gemma3ForConditionalGeneration

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline, Pruning

QUESTION = "what colour is the left object?"
SIZES = {"square": (100, 100), "wide": (210, 70), "tall": (60, 200), "tiny": (31, 29)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("gemma3", tmp_path_factory.mktemp("gemma3"))


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


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_signals_equal_an_eager_reference(folder, pipeline, noise, size):
    whole = Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    picture = noise(size)
    pixels = pipeline.family.processor.image_processor(picture.image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tower = whole.model.vision_tower(pixels, output_attentions=True)
        rows = whole.model.get_image_features(pixels).pooler_output[0]
    encoded = pipeline.encode([picture])[0]
    received = tower.attentions[-1][0].mean((0, 1))  # over heads and queries
    assert torch.allclose(encoded.states, averages(tower.last_hidden_state[0]), atol=1e-5)
    assert torch.allclose(encoded.saliency, averages(received[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(pipeline.family.project(encoded.states), rows, atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_token_covers_its_place_in_the_picture(pipeline, size):
    """What changes when one cell of the picture changes is most of all the token of that cell."""
    before = Image.new("RGB", size, (90, 90, 90))
    (view,) = pipeline.family.encode([before])[0].views
    assert (view.rows, view.cols, view.box) == (4, 4, (0.0, 0.0, 1.0, 1.0))
    tower = pipeline.family.load("tower").model.vision_tower
    for row, col in ((0, 0), (2, 1), (1, 3)):
        after = before.copy()
        cell = zip((col, row, col + 1, row + 1), size * 2, strict=True)
        after.paste((255, 0, 0), tuple(round(quarters / 4 * side) for quarters, side in cell))
        pixels = [pipeline.family.process(picture)[0]["pixel_values"] for picture in (before, after)]
        with torch.no_grad():
            change = tower.embeddings(pixels[1]) - tower.embeddings(pixels[0])
        assert pipeline.family.pool(change)[0].abs().sum(-1).argmax() == row * 4 + col


def test_the_model_is_told_which_tokens_are_an_images(folder, pipeline, noise):
    """Image tokens alone; the processor says the same of the prompt. What fills a batch up is no image's."""
    picture = noise((100, 80))
    given = inputs(pipeline.family.processor, [picture.image], QUESTION)
    assert torch.equal(pipeline.family.extras(given["input_ids"])["token_type_ids"], given["token_type_ids"])
    image = pipeline.family.image_token
    kinds = pipeline.family.extras(torch.tensor([[PAD, PAD, BOS, image, image, 9]]))["token_type_ids"]
    assert kinds.tolist() == [[0, 0, 0, 1, 1, 0]]


def test_a_prompt_begins_once(pipeline, noise):
    """Both the chat template and the tokenizer would begin it."""
    ids = pipeline.family.write_prompt(QUESTION, pipeline.encode([noise((60, 60))]))
    assert pipeline.family.processor.tokenizer("a").input_ids[0] == BOS
    assert ids[0] == BOS and int((ids == BOS).sum()) == 1


def test_keep_everything_is_generate_beyond_the_sliding_window(folder, tmp_path, noise):
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["sliding_window"] = 12
    (short / "config.json").write_text(json.dumps(config))
    whole = Gemma3ForConditionalGeneration.from_pretrained(short, dtype=torch.float32).eval()
    pipeline, picture = Pipeline(str(short), dtype="float32"), noise((100, 80))
    given = inputs(pipeline.family.processor, [picture.image], QUESTION)
    assert given["input_ids"].shape[1] > 2 * 12
    expected = whole.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
    pruned = pipeline.prune(pipeline.encode([picture])[0], QUESTION, Pruning(keep=1.0))
    assert generate(pipeline.family, [pruned], 24)[0].ids == tuple(expected.tolist())
