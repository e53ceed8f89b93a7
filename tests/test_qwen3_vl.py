"""Deepstack: further rows that travel with their token."""

import pytest
import torch

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning

QUESTION = "what colour is the left object?"


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen3_vl")


@pytest.fixture
def encoded(folder, noise):
    """(pipeline, an encoded image, what transformers makes of the same picture)."""
    pipeline = Pipeline(str(folder), dtype="float32")
    picture = noise((150, 90))
    whole = pipeline.family.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = whole.model.get_image_features(**pipeline.family.process(picture.image)[0])
    return pipeline, pipeline.encoder.encode([picture])[0], out


def test_states_hold_features_and_deepstack_side_by_side(encoded):
    pipeline, image, out = encoded
    embeds, *levels = pipeline.family.split(image.vision_features)
    assert image.vision_features.shape == (image.count, 3 * 64)
    assert torch.allclose(embeds, out.pooler_output[0], atol=1e-5)
    assert len(levels) == len(out.deepstack_features) == 2
    for level, expected in zip(levels, out.deepstack_features, strict=True):
        assert torch.allclose(level, expected[0], atol=1e-5)


def test_kept_tokens_keep_their_deepstack(encoded):
    """Of two images, each level gives one block of rows per image, in the order of the tokens' own rows."""
    pipeline, image, out = encoded
    pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.4))
    features = pipeline.family.features([pruned.image_embeds] * 2)
    assert len(features.pooler_output) == 2 and [len(level) for level in features.deepstack_features] == [2, 2]
    for n in range(2):
        assert torch.allclose(features.pooler_output[n], out.pooler_output[0][pruned.kept], atol=1e-5)
        for level, expected in zip(features.deepstack_features, out.deepstack_features, strict=True):
            assert torch.allclose(level[n], expected[0][pruned.kept], atol=1e-5)


def test_relevance_is_of_the_tokens_own_rows(encoded):
    pipeline, image, out = encoded
    family = pipeline.family
    table = family.load("language").get_input_embeddings().weight
    question_embeds = table[family.processor.tokenizer(QUESTION, add_special_tokens=False).input_ids]
    expected = [
        torch.stack([torch.cosine_similarity(row, word, 0) for word in question_embeds]).mean() for row in out[1][0]
    ]
    assert torch.allclose(family.vocabulary(image.vision_features, QUESTION), torch.stack(expected), atol=1e-5)


def test_deepstack_reaches_the_answer(encoded):
    pipeline, image, _ = encoded
    pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.5, method=make_method("fastervlm")))
    model = pipeline.family.load("language")

    def logits(blank):
        features = pipeline.family.features([pruned.image_embeds])
        if blank is not None:
            features.deepstack_features[blank] = [torch.zeros_like(rows) for rows in features.deepstack_features[blank]]
        with torch.no_grad():
            return model(
                input_ids=pruned.input_ids[None],
                attention_mask=torch.ones_like(pruned.input_ids)[None],
                position_ids=pruned.position_ids[:, None],
                mm_encoder_outputs={"image": features},
            ).logits[0, -1]

    for level in range(2):
        assert not torch.allclose(logits(None), logits(level), atol=1e-3)
