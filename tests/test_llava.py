"""The LLaVA family against transformers itself, on a tiny random checkpoint."""

import logging

import pytest
import torch
from PIL import Image
from tiny_families.llava_siglip import write as write_tiny_siglip
from transformers import AutoTokenizer, CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS
from gridprune_cli.settings import Pruning

QUESTIONS = ("What colour is the star?", "How many red circles are there?", "Where is the object with K?")


@pytest.fixture(scope="module")
def reference(tiny_llava):
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), LlavaProcessor.from_pretrained(tiny_llava)


def prompt(processor, image, question):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=[image], text=text, return_tensors="pt")


@pytest.fixture(params=[(224, 224), (300, 120), (60, 200), (9, 7)], ids=["square", "wide", "tall", "tiny"])
def picture(request, noise):
    return noise(request.param)


@pytest.mark.parametrize("question", QUESTIONS)
def test_keep_everything_is_generate(tiny_llava, reference, picture, question):
    model, processor = reference
    inputs = prompt(processor, picture.image, question)
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], question, Pruning(keep=1.0))
    assert generate(pipeline.family, [pruned], 24)[0].ids == tuple(expected.tolist())


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_pruned_equals_masked(tiny_llava, reference, picture, positions):
    """Dropping tokens gives the logits of a model that holds them all and may not look at them."""
    model, processor = reference
    inputs = prompt(processor, picture.image, QUESTIONS[0])
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], QUESTIONS[0], Pruning(keep=0.3, positions=positions))
    image = (inputs["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, image] = 0
    mask[0, image[pruned.kept]] = 1
    places = torch.arange(mask.shape[1]) if positions == "original" else (mask[0].cumsum(0) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**(inputs | {"attention_mask": mask, "position_ids": places[None]})).logits[0, -1]
        ids = pruned.input_ids[None]
        logits = (
            pipeline.family.load("language")(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=pruned.position_ids[None],
                mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
            )
            .logits[0, -1]
            .float()
        )
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, model(**inputs).logits[0, -1], atol=1e-3)  # the dropped tokens did matter


def test_batched_answers_equal_single_ones(tiny_llava, noise):
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    encoded = pipeline.encoder.encode([noise((224, 224)), noise((80, 80), seed=1)])
    sets = [
        pipeline.prune(image, question, Pruning(keep=keep))
        for image, question, keep in zip(encoded * 2, [*QUESTIONS, "Read the star."], (0.1, 1.0, 0.5, 0.3), strict=True)
    ]
    together = generate(pipeline.family, sets, 12)
    assert [generated.ids for generated in together] == [generate(pipeline.family, [one], 12)[0].ids for one in sets]


def test_signals_equal_an_eager_reference(tiny_llava, reference, picture):
    model, processor = reference
    clip = CLIPModel.from_pretrained(tiny_llava / "clip", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava / "clip")
    question = QUESTIONS[0]
    with torch.no_grad():
        out = model.model.vision_tower(
            prompt(processor, picture.image, question)["pixel_values"],
            output_attentions=True,
            output_hidden_states=True,
        )
        vision_features = out.hidden_states[-2][0, 1:]
        patches = clip.visual_projection(clip.vision_model.post_layernorm(vision_features))
        text = clip.get_text_features(**tokenizer(question, return_tensors="pt")).pooler_output
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    encoded = pipeline.encoder.encode([picture])[0]
    assert torch.allclose(encoded.vision_features, vision_features, atol=1e-5)
    assert torch.allclose(encoded.saliency, out.attentions[-2][0, :, 0, 1:].mean(0), atol=1e-6)
    asked = pipeline.encoder.run_tower([picture], optional=OPTIONAL_SIGNALS)[0].optional
    layers = len(out.attentions)
    for name, layer in (("received_attention", layers - 2), ("middle_attention", int(layers * 9 / 24 + 0.5) - 1)):
        assert torch.allclose(asked[name], out.attentions[layer][0].mean((0, 1))[1:], atol=1e-6)
    relevance = pipeline.family.relevance(encoded.vision_features, question)
    assert torch.allclose(relevance, torch.cosine_similarity(patches, text), atol=1e-5)
    dots = patches @ text[0] / text.norm()  # as TRIM's published code has them
    assert torch.allclose(relevance * pipeline.family.patch_lengths(encoded.vision_features), dots, atol=1e-4)
    trim = make_method("trim", cosine=False, mean_token=False)
    kept = pipeline.prune(encoded, question, Pruning(tokens=4, method=trim)).kept
    assert kept.tolist() == (-dots).topk(4).indices.sort().values.tolist()


def test_a_long_question_is_read_to_its_end(tiny_llava, noise, monkeypatch, caplog):
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    pipeline.family.relevance.tokenizer.model_max_length = 12
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    vision_features = pipeline.encoder.encode([noise((224, 224))])[0].vision_features
    question = "red star blue cross green circle white square left right"  # ten, what the text tower takes at once
    first, second = question, "What colour is the star?"
    both = pipeline.family.relevance(vision_features, f"{first} {second}")
    pieces = [pipeline.family.relevance(vision_features, piece) for piece in (first, second)]
    assert torch.allclose(both, torch.stack(pieces).mean(0), atol=1e-6)
    assert not caplog.records  # nobody is told that it was too long


def test_questions_read_together_are_those_read_alone(tiny_llava, noise, monkeypatch):
    from gridprune_cli.vlm import clip

    pipeline, alone = (Pipeline(str(tiny_llava), dtype="float32") for _ in range(2))
    vision_features = pipeline.encoder.encode([noise((224, 224))])[0].vision_features
    questions = [*QUESTIONS, "What?", "red star blue cross green circle white square left right What colour is it?"]
    monkeypatch.setattr(clip, "_BATCH", 2)
    pipeline.family.relevance.read(questions)
    for question in questions:
        together, single = (p.family.relevance(vision_features, question) for p in (pipeline, alone))
        assert torch.allclose(together, single, atol=1e-6)
    monkeypatch.setattr(clip, "_TEXTS", 3)  # no more are kept
    pipeline.family.relevance.read(["Where?"])
    assert list(pipeline.family.relevance._texts) == [*questions[-2:], "Where?"]
    assert torch.equal(
        pipeline.family.relevance(vision_features, QUESTIONS[0]), alone.family.relevance(vision_features, QUESTIONS[0])
    )


def test_layers_behind_the_one_that_is_read_are_not_there(tiny_llava, reference):
    whole = reference[0].model.vision_tower.encoder.layers
    tower = Pipeline(str(tiny_llava), dtype="float32").family.load("tower").model.vision_tower
    assert reference[0].config.vision_feature_layer == -2
    assert len(tower.encoder.layers) == len(whole) - 1


@pytest.mark.parametrize(
    ("size", "box"),
    [((224, 224), (0, 0, 1, 1)), ((448, 224), (0.25, 0, 0.75, 1)), ((100, 400), (0, 0.375, 1, 0.625))],
)
def test_the_view_is_what_the_centre_crop_leaves(tiny_llava, noise, size, box):
    pipeline = Pipeline(str(tiny_llava))
    (view,) = pipeline.encoder.encode([noise(size)])[0].views
    assert (view.rows, view.cols) == (4, 4)
    assert view.box == pytest.approx(box)


def test_a_token_covers_its_place_in_the_picture(tiny_llava):
    """What changes when one cell of the picture changes is first of all the token of that cell."""
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    before = Image.new("RGB", (400, 100), (90, 90, 90))
    after = before.copy()
    after.paste((255, 0, 0), (150 + 25, 50, 150 + 50, 75))  # row 2, column 1 of the crop, pixels 150 to 250
    tower = pipeline.family.load("tower").model.vision_tower
    pixels = pipeline.family.processor.image_processor([before, after], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedded = tower.embeddings(pixels)[:, 1:]
    change = (embedded[1] - embedded[0]).abs().sum(-1)
    assert change.argmax() == 2 * 4 + 1


def test_bfloat16_runs(tiny_llava, noise):
    pipeline = Pipeline(str(tiny_llava), dtype="bfloat16")
    encoded = pipeline.encoder.encode([noise((224, 224))])[0]
    assert encoded.vision_features.dtype == torch.bfloat16
    pruned = pipeline.prune(encoded, QUESTIONS[0], Pruning(tokens=3, method=make_method("fastervlm")))
    assert len(generate(pipeline.family, [pruned], 5)[0].ids) == 5


def test_signals_over_a_siglip_tower_equal_an_eager_reference(tmp_path, noise):
    folder = write_tiny_siglip(tmp_path)
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    family = Pipeline(str(folder), dtype="float32").family
    for size in ((100, 80), (60, 200)):
        picture = noise(size).image
        (encoding,) = family.encode([picture])
        pixels = family.process(picture)[0]["pixel_values"]
        with torch.no_grad():
            out = whole.eval().model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
            rows = whole.model.get_image_features(pixels).pooler_output[0]
        assert torch.allclose(encoding.vision_features, out.hidden_states[-1][0], atol=1e-5)
        assert torch.allclose(encoding.saliency, out.attentions[-1][0].mean((0, 1)), atol=1e-6)  # received
        assert torch.allclose(family.project(encoding.vision_features), rows, atol=1e-5)
        assert encoding.views[0].box == (0, 0, 1, 1)  # stretched, nothing cropped
