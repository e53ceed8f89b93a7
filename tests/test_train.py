"""The training command, on a handful of scenes and steps."""

import json
import os
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.scenes import CHECKPOINT, LOCALIZER
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import (
    CHARACTERS,
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    covering,
    draw,
    make_scene,
    neighbour,
)
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.compressor import load_compressor
from gridprune_cli.vlm.pruning_module import load_pruning_module
from training import model as built
from training import run
from training.data import IGNORE, Pool, asked_patches, normalise
from training.language import answer_loss, pack, places_of, whiten
from training.localizer import LOCALIZER_HEADS, Localizer, extents, seen_owners, shrink
from training.model import IMAGE, WIDTH
from training.plan import Plan
from training.tower import HEADS, properties


@pytest.fixture(scope="module")
def short():
    """Plans of a few steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch)
        yield


def shorten(monkeypatch):
    monkeypatch.setattr(run, "LOG_EVERY", 1)
    monkeypatch.setattr(run, "TOWER", Plan(3, 2, 4, 0, 1e-3, ((0.5, 128), (0.5, 256))))
    monkeypatch.setattr(run, "TOWER_AGAIN", Plan(2, 2, 4, 0, 1e-3, ((1.0, 128),), start=3))
    monkeypatch.setattr(run, "LANGUAGE", Plan(3, 2, 4, 4, 1e-3, ((0.5, 32), (0.5, 256))))
    closely = {"led": ((2, 2), (3, 4)), "closely": True}
    monkeypatch.setattr(run, "LANGUAGE_AGAIN", Plan(1, 2, 4, 4, 1e-3, ((1.0, 256),), start=3, **closely))
    monkeypatch.setattr(run, "LANGUAGE_LAST", Plan(1, 2, 4, 4, 1e-3, ((1.0, 64),), start=4, **closely))
    counts = Plan(1, 2, 4, 4, 1e-3, ((1.0, 64),), start=5, placed=True, **closely)
    monkeypatch.setattr(run, "LANGUAGE_COUNTS", counts)
    plan = Plan(3, 2, 4, 0, 1e-3, ((0.5, 72), (0.5, 144)), led=((1, 2),), closely=True)
    monkeypatch.setattr(run, "LOCALIZER", plan)
    tower = replace(plan, steps=1, first_seed=4, start=3, trains="tower")
    monkeypatch.setattr(run, "LOCALIZER_TOWER", tower)
    again = replace(plan, steps=2, first_seed=4, start=4, led=((2, 2), (3, 4)), trains="language")
    monkeypatch.setattr(run, "LOCALIZER_AGAIN", again)
    monkeypatch.setattr(run, "COMPRESSOR", Plan(3, 2, 4, 4, 1e-3, ((0.5, 28), (0.5, 13))))
    monkeypatch.setattr(run, "PRUNER", Plan(3, 2, 4, 4, 1e-3, ((1.0, 256),)))
    monkeypatch.setattr(run, "PRUNER_AGAIN", Plan(1, 2, 4, 4, 1e-3, ((1.0, 5),), start=3))


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """A run from its start to its end: its folder, and the models that it leaves."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder)


def trained(folder):
    run.train(folder / "out", folder / "work", 0, torch.device("cpu"))
    out = folder / "out"
    models = (LlavaForConditionalGeneration.from_pretrained(out), CLIPModel.from_pretrained(out / "clip"))
    return *models, load_compressor(out), load_pruning_module(out)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_where_another_would(whole, tmp_path, monkeypatch):
    whole_folder, models = whole
    ran: list[tuple[str, int, int]] = []
    for name in ("Tower", "Language", "Compression", "Guided"):
        kind = getattr(run, name)
        losses = kind.losses

        def stop(self, pool, step, plan, device, losses=losses):
            ran.append((type(self).__name__, plan.start, step))
            if step == plan.start + 2:
                raise KeyboardInterrupt
            return losses(self, pool, step, plan, device)

        with monkeypatch.context() as patch:
            patch.setattr(run, "SAVE_EVERY", 1)
            patch.setattr(kind, "losses", stop)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path / "stopped")
    resumed = trained(tmp_path / "stopped")
    for a, b in zip(models, resumed, strict=True):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.allclose(x.float(), y.float(), atol=1e-6), name
    logs = [(folder / "work/log.jsonl").read_text().splitlines() for folder in (whole_folder, tmp_path / "stopped")]
    steps = [[(line["stage"], line["step"]) for line in map(json.loads, log)] for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) == 18
    assert any(weight.any() for weight in (models[2].out.weight, models[2].narrow.weight))  # it learned something
    assert ran.count(("Tower", 0, 0)) == 1 and ran.count(("Language", 0, 0)) == 1  # it went on, it did not start again


@pytest.mark.slow
def test_the_towers_of_both_checkpoints_are_one(whole):
    folder, (llava, clip, *_) = whole
    assert llava.dtype == clip.dtype == torch.bfloat16
    of_clip = clip.vision_model.state_dict()
    of_llava = llava.model.vision_tower.state_dict()
    assert of_llava.keys() == of_clip.keys()
    assert all(torch.equal(of_llava[name], of_clip[name]) for name in of_llava)
    assert not list((folder / "work").glob("*.tmp"))


def shipped_like(out, shipped):
    """Whether training wrote the files, names of weights and settings of a checkpoint that ships."""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (out, shipped)]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix == ".safetensors":
            assert load_file(out / path).keys() == load_file(shipped / path).keys(), path
        elif path.name in ("config.json", "tokenizer_config.json"):
            assert json.loads((out / path).read_text()) == json.loads((shipped / path).read_text()), path


@pytest.mark.slow
def test_what_is_written_has_the_layout_of_what_ships(whole):
    folder, _ = whole
    shipped_like(folder / "out", CHECKPOINT)


@pytest.mark.slow
def test_the_localizer_starts_from_the_towers_first_layers(whole, tmp_path):
    folder, _ = whole  # with the stages that the localizer's run has in common with it
    others = shutil.ignore_patterns("compressor*", "pruner*", "log.jsonl")
    shutil.copytree(folder / "work", tmp_path / "work", ignore=others, copy_function=os.link)
    run.train(tmp_path / "out", tmp_path / "work", 0, torch.device("cpu"), "localizer")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    shipped_like(tmp_path / "out", LOCALIZER)
    processor = LlavaProcessor.from_pretrained(tmp_path / "out")
    saved = torch.load(tmp_path / "work/tower-again.pt", weights_only=True)["model"]
    for name, weight in llava.model.vision_tower.encoder.layers[3].named_parameters():
        of_tower = saved[f"clip.vision_model.encoder.layers.3.{name}"]
        assert torch.allclose(weight, of_tower, atol=0.02), name  # three steps move it little
    picture, _ = draw(make_scene(0))
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the red star?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE).sum()) == 144
    assert llava(**inputs).logits.isfinite().all()
    log = [json.loads(line) for line in (tmp_path / "work/log.jsonl").read_text().splitlines()]
    losses = {line["stage"]: set(line) - {"stage", "step", "tokens", "seconds"} for line in log}
    assert losses["localizer"] == {"dense", "answer", "look"} and losses["localizer-tower"] == {"dense"}
    assert losses["localizer-again"] == {"answer", "look"} and "compressor" not in losses
    before, after = (
        torch.load(tmp_path / f"work/{name}.pt", weights_only=True)["model"]
        for name in ("localizer-tower", "localizer-again")
    )
    for name, weight in before.items():  # it learned the tower in one, the language model in the other
        assert torch.equal(weight, after[name]) == ("vision_tower" in name or name.startswith("heads")), name


@pytest.mark.slow
def test_the_localizer_takes_over_the_main_models_vocabulary_and_image_embeds(short, tmp_path):
    """On the main model's vision features, scaled down, its projector would give the main model's image embeds."""
    pool = Pool(tmp_path, 4, 64)
    tower, language = run.Tower(), run.Language()
    language.features = run.store_features(tower, pool, tmp_path / "features.npy", torch.device("cpu"))
    features = torch.from_numpy(np.array(language.features)).float()
    whiten(language.llava.model.multi_modal_projector, features.flatten(0, 1))
    localizer = Localizer(tower)

    def scaled(grid):
        grid = grid.transpose(1, 2).unflatten(2, (16, 16))
        return torch.nn.functional.adaptive_avg_pool2d(grid, (12, 12)).flatten(2).transpose(1, 2)

    localizer.vision_features = lambda pixels, chosen=None: scaled(features)
    localizer.adopt(language, pool)
    with torch.no_grad():
        embeds = localizer.llava.model.multi_modal_projector(scaled(features))
        wanted = scaled(language.llava.model.multi_modal_projector(features))
    assert (embeds - wanted).square().mean() < 0.1 * wanted.var()
    wide, narrow = language.llava.model.language_model, localizer.llava.model.language_model
    vocabulary = len(wide.embed_tokens.weight)
    assert torch.equal(narrow.embed_tokens.weight[:vocabulary], wide.embed_tokens.weight)
    for a, b in zip(narrow.layers, wide.layers, strict=False):
        assert torch.equal(a.self_attn.q_proj.weight, b.self_attn.q_proj.weight)
        kept = [int((b.mlp.up_proj.weight == row).all(1).nonzero()) for row in a.mlp.up_proj.weight]
        assert kept == sorted(set(kept)) and len(kept) == 384
        assert torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight[:, kept])


def test_the_localizer_sees_the_owners_and_pixels_of_its_own_size():
    scene = make_scene(3)
    picture, owner = draw(scene)
    seen = seen_owners(scene).reshape(12, 12)
    for row in range(12):
        for col in range(12):
            if seen[row, col] >= 0:  # three quarters of the size: the object is within a pixel of that patch
                y, x = int(row * 56 / 3), int(col * 56 / 3)
                assert (owner[max(0, y - 1) : y + 20, max(0, x - 1) : x + 20] == seen[row, col] + 1).mean() > 0.2
    assert {o - 1 for o in set(owner.flatten().tolist()) if o} <= set(seen.flatten().tolist())
    processor = built.make_processor(168, built.make_localizer_tokenizer()).image_processor
    pixels = normalise(shrink(np.asarray(picture)[None]), torch.device("cpu"))
    assert torch.equal(pixels, processor([picture], return_tensors="pt")["pixel_values"])


def test_extents_are_the_boxes_of_the_object_its_like_and_its_neighbours():
    for seed in range(20):
        scene = make_scene(seed)
        table = extents(scene)
        assert table.shape == (8, len(LOCALIZER_HEADS))
        assert all((column < classes).all() for column, (classes, _) in zip(table.T, LOCALIZER_HEADS, strict=True))
        for i, (row, o) in enumerate(zip(table, scene.objects, strict=False)):
            assert tuple(row[3:7]) == covering(scene, (i,))
            x0, y0, x1, y1 = (o.box[0] // 28, o.box[1] // 28, (o.box[2] - 1) // 28, (o.box[3] - 1) // 28)
            assert tuple(row[3:7]) == (x0, y0, x1, y1)
            same = tuple(j for j, p in enumerate(scene.objects) if p.shape == o.shape)
            assert tuple(row[11:15]) == covering(scene, same)
            for d, direction in enumerate(DIRECTIONS):
                j, box = neighbour(scene, i, direction), tuple(row[19 + 4 * d : 23 + 4 * d])
                assert box == ((IGNORE,) * 4 if j is None else (8,) * 4 if j < 0 else covering(scene, (j,)))


@pytest.mark.slow
def test_the_compressor_learns_from_what_it_will_be_given(whole):
    """Saliency and relevance in training are those of the pipeline, but for the rounding of 16 bit."""
    folder, _ = whole
    pipeline = Pipeline(str(folder / "out"), dtype="float32")
    seed, text = run.COMPRESSOR.first_seed, "Where is the star?"
    image = pipeline.encoder.encode([Picture(draw(make_scene(seed))[0], "0" * 64, "scene", ())])[0]
    stored = torch.from_numpy(np.load(folder / "work/compressor-saliency.npy")[0])
    assert torch.allclose(stored, image.saliency, rtol=0.1, atol=1e-4)
    models = (LlavaForConditionalGeneration, folder / "out"), (CLIPModel, folder / "out/clip")
    stage = run.Compression(*(kind.from_pretrained(folder, dtype=torch.float32) for kind, folder in models))
    relevance = stage.relevance(image.vision_features[None], [text])[0]
    assert torch.allclose(relevance, pipeline.family.relevance(image.vision_features, text), atol=1e-5)
    pruned = pipeline.prune(image, text, Pruning(plc="trained"))
    assert pruned.plc == "trained" and len(pruned.image_embeds) == 28


@torch.no_grad()
@pytest.mark.slow
def test_the_pruning_module_learns_from_what_it_will_be_given(whole):
    """What it scores in training is what the pipeline has it score, of questions padded to one length."""
    folder, _ = whole
    pipeline, scene = Pipeline(str(folder / "out"), dtype="float32"), make_scene(run.PRUNER.first_seed)
    image = pipeline.encoder.encode([Picture(draw(scene)[0], "0" * 64, "scene", ())])[0]
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "out", dtype=torch.float32)
    stage = run.Guided(llava, load_pruning_module(folder / "out"))
    stage.features = np.load(folder / "work/pruner-features.npy")
    group = questions(scene, 4, random.Random(0))
    _, image_embeds = stage.image_embeds(np.array([0]), torch.device("cpu"))
    for question, scores in zip(group, stage.scores(image_embeds, [group]), strict=True):
        expected = pipeline.family.importance(image.vision_features, question.text)
        assert torch.allclose(scores, expected, atol=0.01) and expected.std() > 0.1  # features are stored in 16 bit


@torch.no_grad()
def test_a_token_that_is_not_retained_is_as_if_it_were_not_there():
    llava, scene, tokenizer = run.Language().llava.eval(), make_scene(0), built.make_tokenizer(close=False)
    features, owners = torch.randn(1, 256, WIDTH), torch.full((1, 256), -1)
    group = questions(scene, 1, random.Random(0))

    def loss(chosen, retained=None):
        packed = pack([group], chosen[None], owners, tokenizer, random.Random(0))
        return float(answer_loss(llava, features[:, chosen], packed, retained))

    some, fewer = torch.arange(40), torch.arange(0, 40, 2)
    retained = torch.where(some % 2 == 0, 0.0, -1e4)[None]
    assert loss(some, retained) == pytest.approx(loss(fewer), abs=1e-4)
    assert loss(some, torch.zeros(1, 40)) == pytest.approx(loss(some), abs=1e-5)
    assert abs(loss(some) - loss(fewer)) > 1e-3


def test_a_plan_shows_the_tokens_and_rates_it_says():
    plan = Plan(1000, 4, 10, 0, 1.0, ((0.25, 32), (0.75, 256)), start=500)
    assert [plan.tokens_at(step) for step in (500, 749, 750, 1499)] == [32, 32, 256, 256]
    rates = [plan.rate_at(step) for step in range(500, 1500)]
    assert rates[0] < 0.01 and max(rates) == pytest.approx(rates[199], rel=0.05) and rates[-1] < 0.03


def test_packed_questions_see_the_image_and_themselves_alone():
    """Any other question behind the same image leaves a question's positions, and what it may look at, unchanged."""
    owners = torch.full((1, 256), -1)
    owners[0, :9] = 0
    chosen = torch.arange(256)[None]
    tokenizer = built.make_tokenizer(close=False)
    asked = questions(make_scene(0), 3, random.Random(0))
    packed = pack([asked], chosen, owners, tokenizer, random.Random(1))
    segments = []
    for last in packed.probed[0]:
        attended = packed.mask[0, 0, last].nonzero()[:, 0]
        image = (packed.ids[0] == IMAGE).nonzero()[:, 0]
        assert set(image.tolist()) <= set(attended.tolist())
        segment = [i for i in attended.tolist() if i > image[-1]]
        assert segment == list(range(segment[0], last + 1))
        assert packed.positions[0, segment].tolist() == list(range(3 + 256, 3 + 256 + len(segment)))
        segments.append(set(segment))
    assert not segments[0] & segments[1] and not segments[1] & segments[2]
    labels = packed.labels[0][packed.labels[0] >= 0]
    answered = tokenizer.decode(labels, skip_special_tokens=True).split()
    assert answered == [word for question in asked for word in question.answer.split()]


def test_the_places_of_what_is_asked_for_are_as_many_as_the_answer_to_how_many():
    rng = random.Random(0)
    scenes = [make_scene(seed) for seed in range(30)]
    groups = [questions(scene, 8, rng) for scene in scenes]
    places = places_of(groups, scenes)
    assert places.shape == (30, 8, 9)
    for held, question in zip(places.flatten(0, 1), (q for group in groups for q in group), strict=True):
        if question.kind == "count":
            assert held.sum() == int(question.answer)
        elif question.kind == "place":
            assert [PLACES[i] for i in held.nonzero()[:, 0]] == [question.answer]
        elif question.kind != "exists":
            assert held.sum() == 1


def test_asked_patches_share_one():
    owners = torch.tensor([-1, 0, 0, 1, -2, 2])
    assert asked_patches(owners, (0, 2)).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert asked_patches(owners, ()).sum() == 0


def test_the_tower_reads_properties_of_the_right_object():
    table = properties(make_scene(0))
    objects = make_scene(0).objects
    assert table.shape == (8, len(HEADS)) and (table[len(objects) :] == IGNORE).all()
    for row, o in zip(table, objects, strict=False):
        assert list(COLOURS)[row[0]] == o.colour and SHAPES[row[1]] == o.shape
        assert CHARACTERS[row[2]] == o.character and PLACES[row[3]] == o.place
        assert row[4] == sum(p.colour == o.colour for p in objects) - 1
    assert run.Tower().heads.in_features == WIDTH
