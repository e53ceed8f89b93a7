"""Gemma 3 in particular: what the model is told, and windows. What it shares with PaliGemma is tested there."""

import json
import shutil

import pytest
import torch
from tiny_families import BOS, PAD
from tiny_families.gemma3 import inputs
from transformers import Gemma3ForConditionalGeneration

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

QUESTION = "what colour is the left object?"


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("gemma3")


@pytest.fixture
def pipeline(folder):
    return Pipeline(str(folder), dtype="float32")


def test_the_model_is_told_which_tokens_are_an_images(folder, pipeline, noise):
    """Image tokens alone; the processor says the same of the prompt. What fills a batch up is no image's."""
    picture = noise((100, 80))
    model_inputs = inputs(pipeline.family.processor, [picture.image], QUESTION)
    assert torch.equal(
        pipeline.family.extras(model_inputs["input_ids"])["token_type_ids"], model_inputs["token_type_ids"]
    )
    image = pipeline.family.image_token
    kinds = pipeline.family.extras(torch.tensor([[PAD, PAD, BOS, image, image, 9]]))["token_type_ids"]
    assert kinds.tolist() == [[0, 0, 0, 1, 1, 0]]


def test_a_prompt_begins_once(pipeline, noise):
    """Both the chat template and the tokenizer would begin it."""
    ids = pipeline.family.write_prompt(QUESTION, pipeline.encoder.encode([noise((60, 60))]))
    assert pipeline.family.processor.tokenizer("a").input_ids[0] == BOS
    assert ids[0] == BOS and int((ids == BOS).sum()) == 1


def test_keep_everything_is_generate_beyond_the_sliding_window(folder, tmp_path, noise):
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["sliding_window"] = 12
    (short / "config.json").write_text(json.dumps(config))
    whole = Gemma3ForConditionalGeneration.from_pretrained(short, dtype=torch.float32).eval()
    pipeline, picture = Pipeline(str(short), dtype="float32"), noise((100, 80))
    model_inputs = inputs(pipeline.family.processor, [picture.image], QUESTION)
    assert model_inputs["input_ids"].shape[1] > 2 * 12
    expected = whole.generate(**model_inputs, max_new_tokens=24, do_sample=False)[
        0, model_inputs["input_ids"].shape[1] :
    ]
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], QUESTION, Pruning(keep=1.0))
    assert generate(pipeline.family, [pruned], 24)[0].ids == tuple(expected.tolist())
