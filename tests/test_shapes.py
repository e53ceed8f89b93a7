"""Published shapes: as large as what was published, and whole once they are built."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from gridprune_cli.bench.measure import sample_scene
from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import shapes
from gridprune_cli.vlm.shapes import SHAPES, build, find_shape

PUBLISHED = {"llava-1.5-7b": 7.06, "llava-next-7b": 7.06, "qwen2.5-vl-7b": 8.29, "qwen2.5-vl-3b": 3.75}  # 1e9 weights
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL = {
    "text_config": TEXT | {"num_hidden_layers": 3, "vocab_size": 64},
    "vision_config": TOWER | {"projection_dim": 32},
}


def shrunk(name):
    """The shape with the same pictures and as many tokens, in small matrices."""
    shape = SHAPES[name]
    config = copy.deepcopy(shape.config)
    for section, values in SMALL.items():
        config[section] |= values
    if "rope_parameters" in config["text_config"]:
        config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
        config["vision_config"] |= {"depth": 3, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    clip = shape.clip and copy.deepcopy(shape.clip) | {"projection_dim": 32, "vision_config": config["vision_config"]}
    if clip:
        clip["text_config"] |= TOWER | {"vocab_size": 64, "projection_dim": 32}
    return replace(shape, config=config, clip=clip)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_as_large_as_published(name, tmp_path):
    shape = find_shape(name)
    shapes._write(shape, shape.layers, tmp_path)
    with torch.device("meta"):
        model = shape.family.model_class._from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.005)


@pytest.mark.parametrize(
    ("name", "tokens", "separators", "text_tokens"),
    [("llava-1.5-7b", 576, 0, 8), ("llava-next-7b", 2880, 48, 37), ("qwen2.5-vl-7b", 576, 0, 20)],
)
def test_a_shape_answers(name, tokens, separators, text_tokens):
    family = build(shrunk(name), torch.float32, "cpu", layers=2)
    pipeline = Pipeline(family)
    image, _ = pipeline.encode(sample_scene(pipeline.model))
    assert image.count == tokens and torch.isfinite(image.saliency).all()
    pruned = pipeline.prune(image, "What is it?", Pruning(keep=1.0))
    assert len(pruned.image_embeds) == tokens + separators
    assert len(pruned.input_ids) - len(pruned.image_embeds) == text_tokens
    assert isinstance(pipeline.generate(pipeline.prune(image, "What is it?", Pruning()), max_new_tokens=3), str)
    model = family.load("language")
    assert len(model.model.language_model.layers) == 2
    assert all(parameter.std() > 0.01 for parameter in model.parameters() if parameter.dim() > 1)
    assert "2 of 3 layers" in pipeline.model and "random weights" in pipeline.model


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_a_shape_has_the_layers_of_the_tower_that_are_read(name):
    family = build(shrunk(name), torch.float32, "cpu")
    assert len(family.load("tower").model.vision_tower.encoder.layers) == 2  # of 3: the last but one is read


def test_rows_of_a_matrix_differ():
    family = build(shrunk("llava-1.5-7b"), torch.float32, "cpu")
    table = family.load("language").get_input_embeddings().weight
    assert len(table.unique(dim=0)) == len(table) == 64


def test_bad_shapes():
    with pytest.raises(BadInput, match=r"shape=llava: not one of llava-1\.5-7b"):
        find_shape("llava")
    for layers in (0, 4):
        with pytest.raises(BadInput, match=f"layers={layers}: .* has 1 to 3"):
            build(shrunk("llava-1.5-7b"), torch.float32, "cpu", layers)
    with pytest.raises(BadInput, match=r"GB of weights, but .* take `dtype=bfloat16`, `quantize`, or fewer `layers`"):
        shapes._check_room(1 << 60, "cpu")
