"""Words of a question, as methods see them."""

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm.word_relevance import keywords


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What colour is the star?", "colour star"),
        ("How many red circles are there, left of A?", "many red circles left A"),
        ("A sign I see?", "sign see"),
        ("Who is it?", "Who is it?"),  # nothing else is left
        ("Wie viele rote Kreise?", "Wie viele rote Kreise"),
        ("...", "..."),
    ],
)
def test_keywords(question, expected):
    assert keywords(question) == expected


def test_vectors_are_the_language_models_embeddings(tiny_llava):
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_llava)("colour star", add_special_tokens=False).input_ids
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    vectors = pipeline.family.vocabulary.vectors("colour star")
    assert torch.equal(vectors, model.get_input_embeddings()(torch.tensor(ids)))
