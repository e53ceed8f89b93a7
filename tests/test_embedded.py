"""The checkpoint that ships: two plain checkpoints of one tower, and right answers through the whole pipeline."""

import hashlib
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput, NoScene
from gridprune_cli.evaluation.data import open_data
from gridprune_cli.evaluation.results import summarise
from gridprune_cli.evaluation.run import Cell, Plan, answers
from gridprune_cli.generation import generate
from gridprune_cli.images import Picture, load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.scenes import CHECKPOINT, LOCALIZER
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import EncodedImage

SAMPLES = Path(__file__).parent.parent / "sample_images"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline("scenes")


def test_plain_transformers_loads_both():
    models = []
    for kind, folder in ((AutoModelForImageTextToText, CHECKPOINT), (CLIPModel, CHECKPOINT / "clip")):
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert model.dtype == torch.bfloat16
        models.append(model)
    llava, clip = models
    of_llava, of_clip = llava.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert of_llava.keys() == of_clip.keys()
    assert all(torch.equal(of_llava[name], of_clip[name]) for name in of_llava)
    assert llava.config.vision_config.image_size == 224 and llava.config.vision_feature_layer == -2


TRAINED = {  # sha256 of the weights as training left them: name without `vision_model.`, shape, dtype and bytes of each
    CHECKPOINT: "76ad4611a05672be48e48e31c0b551e364fef37620f72b1e663a80a3987c96ce",
    LOCALIZER: "a3429532493175c58e7d2701c57860c36367c5a565898dd550850005951b21c5",
}


@pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)
def test_the_layout_is_the_published_one(folder):
    """As engines and transformers 4 want it: one file of weights, published names, settings where these look."""
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    weights = load_file(folder / "model.safetensors")
    parts = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.", "vision_tower.vision_model.")
    assert all(name.startswith(parts) for name in weights)
    total = hashlib.sha256()
    for name, weight in sorted((name.replace("vision_model.", ""), weight) for name, weight in weights.items()):
        data = weight.view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {tuple(weight.shape)} {weight.dtype}\0".encode() + data)
    assert total.hexdigest() == TRAINED[folder]
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend


def test_it_takes_at_most_20_mb():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 20_000_000


@pytest.mark.parametrize(("begin", "end"), [(0, 50), pytest.param(50, 400, marks=pytest.mark.slow)])
def test_keep_everything_is_generate_on_scenes(pipeline, begin, end):
    """Token for token, 25 scenes at a time on both sides, in float32."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    processor.tokenizer.padding_side = "left"
    eos = model.generation_config.eos_token_id
    for first in range(HELDOUT + begin, HELDOUT + end, 25):
        scenes = {seed: make_scene(seed) for seed in range(first, first + 25)}
        pictures = [draw(scene)[0] for scene in scenes.values()]
        texts = [questions(scene, 1, random.Random(seed))[0].text for seed, scene in scenes.items()]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        answers = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        encoded = pipeline.encoder.encode(
            [Picture(picture, f"{seed:064x}", str(seed)) for seed, picture in zip(scenes, pictures, strict=True)]
        )
        sets = [pipeline.prune(image, text, Pruning(keep=1.0)) for image, text in zip(encoded, texts, strict=True)]
        generated = generate(pipeline.family, sets, 16)
        for text, answer, ours in zip(texts, answers.tolist(), generated, strict=True):
            expected = answer[: answer.index(eos) + 1]  # every answer ends within 16 tokens
            assert list(ours.ids) == expected, text


def test_the_samples_are_answered_right(pipeline):
    lines = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) >= 6
    right = {}
    for share in (1.0, 0.11):
        pruning = Pruning(keep=share)
        asked = [(line, pipeline.ask(SAMPLES / line["image"], line["question"], pruning)) for line in lines]
        right[share] = [answer.text in line["answers"] for line, answer in asked]
    assert all(right[1.0])
    assert sum(right[0.11]) >= 0.85 * len(lines)


@pytest.mark.slow
def test_an_evaluation_on_a_few_scenes(pipeline):
    cells = (Cell("gridprune", Pruning()), Cell("one token", Pruning(tokens=1)))
    plan, samples = Plan(open_data("scenes:80"), cells, batch=80), {}
    for _ in answers(pipeline, plan, samples):
        pass
    results = summarise(plan, samples)
    full, ours, least = (cell["score"] for cell in results["cells"])
    assert results["images"] == 20 and len(samples) == 240
    assert full > 0.9 and ours > 0.9 > 0.8 > least
    region = results["cells"][1]["region"]
    assert region["contains"] > 0.8 and region["area"] < 0.5 and region["questions"] > 40


# ---- pictures that are no scenes -------------------------------------------------------------------------------------

PHOTO, SCENE, QUESTION = SAMPLES / "hills.jpg", SAMPLES / "scene-1.png", "Which object has the T?"
NOTE = f"{PHOTO}: no scene: the embedded model knows only its own scenes"
REFUSED = f"{PHOTO}: no scene, and the model that comes with the package knows nothing else"


@pytest.fixture
def questions_file(tmp_path):
    """A question about a picture that is no scene, and one about a scene."""
    path = tmp_path / "questions.jsonl"
    lines = [
        {"id": name, "image": str(image), "question": QUESTION, "answers": ["red star"]}
        for name, image in (("photo", PHOTO), ("scene", SCENE))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", PHOTO, QUESTION),
        ("ask", SCENE, PHOTO, QUESTION, "--json"),
        ("prune", PHOTO, QUESTION, "-o", "p.safetensors"),
        ("show", PHOTO, QUESTION),
        ("bench", PHOTO, "--repeat", "1"),
        ("eval", "questions.jsonl", "-o", "run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_a_model_chosen_they_are_refused(command, pipeline, tmp_path, monkeypatch, arguments, cached, request):
    if cached:
        encoded, _ = pipeline.encode(PHOTO)
        open_store().put(encoded.encoder, encoded.key, encoded.to_bytes())
    request.getfixturevalue("questions_file")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and REFUSED in err
    assert "--model HuggingFaceTB/SmolVLM-256M-Instruct" in err and "gridprune models default Hugging" in err
    assert not (tmp_path / "p.safetensors").exists()


def test_without_a_model_chosen_the_others_of_many_go_on(command, questions_file, tmp_path):
    for _ in range(2):
        code, out, err = command("batch", questions_file)
        photo, scene = records(out)
        assert code == 3 and photo["error"].startswith(REFUSED) and photo["error_type"] == "BadInput"
        assert (scene["answer"], scene["notes"]) == ("red star", [])
        assert "questions.jsonl:1: " + REFUSED in err
        command("encode", PHOTO, "--model", "scenes")  # so that the second time it is in the cache
    code, out, _ = command("prune", "--batch", questions_file, "-o", tmp_path, "--json")
    photo, scene = records(out)
    assert code == 3 and photo["error"].startswith(REFUSED) and scene["notes"] == []
    assert not (tmp_path / "photo.safetensors").exists() and (tmp_path / "scene.safetensors").exists()
    code, out, err = command("encode", PHOTO, SCENE, "--json")
    assert code == 3 and "1 of 2 could not be encoded" in err
    assert records(out)[0]["error"].startswith(REFUSED) and records(out)[1]["cache"] == "hit"
    for refresh in ((), ("--refresh",)):
        plan = json.loads(command("encode", PHOTO, SCENE, "--dry-run", "--json", *refresh)[1])
        assert (plan["unreadable"], plan["hits"] + plan["encode"]) == (1, 1)


def test_where_scenes_is_chosen_they_are_answered_with_a_note(command, questions_file, tmp_path, monkeypatch):
    for chosen in ("flag", "config", "variable"):
        flag = ("--model", "scenes") if chosen == "flag" else ()
        if chosen == "config":
            (tmp_path / "config" / "gridprune").mkdir(parents=True)
            (tmp_path / "config" / "gridprune" / "config.toml").write_text('model = "scenes"\n')
        if chosen == "variable":
            monkeypatch.setenv("GRIDPRUNE_MODEL", "scenes")
        code, out, err = command("ask", PHOTO, QUESTION, "--json", "-q", *flag)
        record = json.loads(out)
        assert (code, err) == (0, "") and record["answer"]
        assert len(record["notes"]) == 1 and record["notes"][0].startswith(NOTE)
    photo, scene = records(command("batch", questions_file, "-q")[1])
    assert (photo["notes"], photo["answer"]) == (record["notes"], record["answer"]) and scene["notes"] == []
    lines = records(command("encode", PHOTO, SCENE, "--json", "-q")[1])
    assert [line["notes"] for line in lines] == [record["notes"], []]
    saved = tmp_path / "p.safetensors"
    code, out, _ = command("prune", PHOTO, SCENE, QUESTION, "-o", saved, "--json", "-q")
    assert code == 0 and json.loads(out)["notes"] == record["notes"]
    monkeypatch.delenv("GRIDPRUNE_MODEL")
    (tmp_path / "config" / "gridprune" / "config.toml").unlink()
    code, out, _ = command("generate", saved, "--json")  # whose model is the set's
    assert code == 0 and json.loads(out)["notes"] == record["notes"]


def test_in_python_too_scenes_is_taken_by_name(pipeline):
    answer = pipeline.ask(PHOTO, QUESTION)
    assert len(answer.notes) == 1 and answer.notes[0].startswith(NOTE)
    nobodys = Pipeline()
    assert nobodys.ask(SCENE, QUESTION).text == pipeline.ask(SCENE, QUESTION).text == "red star"
    with pytest.raises(BadInput, match="no scene"):
        nobodys.encoder.encode([load_image(PHOTO)])
    copied = pickle.loads(pickle.dumps(Pipeline()))  # as Ray's workers get it
    with pytest.raises(BadInput, match="no scene"):
        copied.encode(PHOTO)
    shown = [type(result) for _, result, _ in nobodys.encode_all([PHOTO, SCENE])]
    assert shown == [NoScene, EncodedImage] and issubclass(NoScene, BadInput)
