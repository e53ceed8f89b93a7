"""The trained module of CoViPAL: what it computes, how it is read, and which models have none."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.pruning_module import FILE, WIDTH, PruningModule, load_pruning_module, save_pruning_module

COVIPAL = Pruning(tokens=5, method=make_method("covipal"))
QUESTION = "What is left of the star?"


@pytest.fixture
def picture_file(noise, tmp_path):
    noise((112, 112)).image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def module():
    """Random weights throughout, biases and norms too."""
    torch.manual_seed(0)
    module = PruningModule(8).eval()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return module


def linear(layer, vector):
    units = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [math.fsum(w * x for w, x in zip(weights, vector, strict=True)) + bias for weights, bias in units]


def norm(layer, vector):
    mean = math.fsum(vector) / len(vector)
    scale = math.sqrt(math.fsum((x - mean) ** 2 for x in vector) / len(vector) + layer.eps)
    return [
        (x - mean) / scale * w + b for x, w, b in zip(vector, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def gelu(vector):
    return [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in vector]


def slow_scores(module, image_embeds, question_embeds):
    """The formula in plain Python, token by token."""
    tokens = [
        linear(module.question, gelu(linear(module.token, norm(module.norm_question, t)))) for t in question_embeds
    ]
    mean = [math.fsum(numbers) / len(tokens) for numbers in zip(*tokens, strict=True)] if tokens else [0.0] * WIDTH
    factors = linear(module.factors, gelu(mean))
    scores = []
    for token in image_embeds:
        narrow = linear(module.image, norm(module.norm_image, token))
        products = [x * factor for x, factor in zip(narrow, factors, strict=True)]
        hidden = gelu(linear(module.hidden, norm(module.norm_products, products)))
        scores += linear(module.score, products + hidden)
    return scores


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 5])
def test_it_is_its_formula(module, count):
    image_embeds, question_embeds = torch.randn(1, 6, 8), torch.randn(1, count, 8)
    scores = module(image_embeds, question_embeds)[0]
    expected = slow_scores(module, image_embeds[0].tolist(), question_embeds[0].tolist())
    assert scores.std() > 0.01 and torch.allclose(scores, torch.tensor(expected), atol=1e-4)


@torch.no_grad()
def test_padding_counts_for_nothing(module):
    image_embeds, question_embeds = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    is_token = torch.arange(5) < torch.tensor([[2], [5]])
    scores = module(image_embeds, question_embeds, is_token)
    assert torch.allclose(scores[:1], module(image_embeds[:1], question_embeds[:1, :2]), atol=1e-5)
    assert torch.allclose(scores[1:], module(image_embeds[1:], question_embeds[1:]), atol=1e-5)
    assert not torch.allclose(scores[:1], module(image_embeds[:1], question_embeds[:1]), atol=1e-3)


def test_it_comes_back_from_disk_in_16_bit(module, tmp_path):
    save_pruning_module(module, tmp_path)
    again = load_pruning_module(tmp_path)
    for (name, saved), loaded in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert loaded.dtype == torch.float32 and torch.equal(saved.bfloat16().float(), loaded), name


@pytest.mark.parametrize("spoil", ["cut", "renamed", "flat"])
def test_a_broken_one_is_named_in_one_line(module, tmp_path, spoil):
    save_pruning_module(module, tmp_path)
    path = tmp_path / FILE
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif spoil == "flat":
        save_file({name: weight.flatten() for name, weight in load_file(path).items()}, path)
    else:
        save_file({f"{name}x": weight for name, weight in load_file(path).items()}, path)
    with pytest.raises(GridpruneError, match=r"covipal/model\.safetensors: can't be loaded") as caught:
        load_pruning_module(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_it_scores_highest_is_kept(tiny_llava, noise):
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    family, (image,) = pipeline.family, pipeline.encoder.encode([noise((224, 224))])
    ids = family.processor.tokenizer(QUESTION, add_special_tokens=False).input_ids
    embedding = family.load("language").get_input_embeddings().weight[ids]
    expected = slow_scores(
        load_pruning_module(tiny_llava), family.project(image.vision_features).tolist(), embedding.tolist()
    )
    kept = sorted(sorted(range(image.count), key=lambda i: -expected[i])[:5])
    assert pipeline.prune(image, QUESTION, COVIPAL).kept.tolist() == kept


def test_a_model_without_one_is_refused_before_more_is_loaded(tiny_llava, picture_file, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "model", ignore=shutil.ignore_patterns("covipal"))
    pipeline = Pipeline(str(folder), dtype="float32")
    with pytest.raises(BadInput, match=r"method=covipal: .* has no covipal/model\.safetensors, the module") as caught:
        pipeline.ask(picture_file, QUESTION, COVIPAL)
    assert "\n" not in str(caught.value) and set(pipeline.family._loaded) <= {"tower"}


def test_the_embedded_model_has_one_that_looks_where_the_question_asks():
    """Of the five tokens that are kept most show the object that is asked for; of random ones hardly any would."""
    import random

    from gridprune_cli.images import Picture
    from gridprune_cli.scenes.questions import ask
    from gridprune_cli.scenes.scene import TUNE, draw, make_scene
    from training.data import patch_owners

    pipeline, hits, rng = Pipeline("scenes"), [], random.Random(0)
    for seed in range(TUNE, TUNE + 8):
        scene = make_scene(seed)
        image, owner = draw(scene)
        question = ask(scene, "colour", rng)
        if question is None:
            continue
        (encoded,) = pipeline.encoder.encode([Picture(image, "0" * 64, "scene")])
        kept = pipeline.prune(encoded, question.text, COVIPAL).kept
        hits += [int(patch_owners(owner)[i]) in question.asked for i in kept.tolist()]
    assert sum(hits) > len(hits) / 2
