"""The checkpoint that ships: two plain checkpoints of one tower, and right answers through the whole pipeline."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from gridprune_cli.evaluation.data import open_data
from gridprune_cli.evaluation.results import summarise
from gridprune_cli.evaluation.run import Cell, Plan, answers
from gridprune_cli.generation import generate
from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline, Pruning
from gridprune_cli.scenes import CHECKPOINT
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene, questions

SAMPLES = Path(__file__).parent.parent / "sample_images"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline()


def test_plain_transformers_loads_both():
    models = []
    for kind, folder in ((LlavaForConditionalGeneration, CHECKPOINT), (CLIPModel, CHECKPOINT / "clip")):
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert model.dtype == torch.bfloat16
        models.append(model)
    llava, clip = models
    mine, theirs = llava.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert llava.config.vision_config.image_size == 224 and llava.config.vision_feature_layer == -2


def test_it_takes_at_most_20_mb():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 20_000_000


def test_keep_everything_is_generate_on_200_scenes(pipeline):
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    for seed in range(HELDOUT, HELDOUT + 200):
        scene = make_scene(seed)
        picture = draw(scene)[0]
        (question,) = questions(scene, 1, random.Random(seed))
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[picture], text=text, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        encoded = pipeline.encode([Picture(picture, f"{seed:064x}", str(seed))])[0]
        made = generate(pipeline.family, [pipeline.prune(encoded, question.text, Pruning(keep=1.0))], 16)[0]
        assert made.ids == tuple(expected.tolist()), question


def test_the_samples_are_answered_right(pipeline):
    lines = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) >= 6
    right = {}
    for keep in (1.0, 0.11):
        pruning = Pruning(keep=keep)
        asked = [(line, pipeline.ask(SAMPLES / line["image"], line["question"], pruning)) for line in lines]
        right[keep] = [answer.text in line["answers"] for line, answer in asked]
    assert all(right[1.0])
    assert sum(right[0.11]) >= 0.85 * len(lines)


def test_an_evaluation_on_a_few_scenes(pipeline):
    cells = (Cell("gridprune", Pruning()), Cell("one token", Pruning(tokens=1)))
    plan, rows = Plan(open_data("scenes:80"), cells, batch=80), {}
    for _ in answers(pipeline, plan, rows):
        pass
    results = summarise(plan, rows)
    full, ours, least = (cell["score"] for cell in results["cells"])
    assert results["images"] == 20 and len(rows) == 240
    assert full > 0.9 and ours > 0.9 > 0.8 > least
    region = results["cells"][1]["region"]
    assert region["contains"] > 0.8 and region["area"] < 0.5 and region["questions"] > 40


def test_other_pictures_are_remarked_on(pipeline):
    answer = pipeline.ask(SAMPLES / "hills.jpg", "What colour is the star?")
    assert any("knows only its own scenes" in note for note in answer.notes)
    assert not pipeline.ask(SAMPLES / "scene-1.png", "What colour is the star?").notes
