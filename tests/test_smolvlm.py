"""What SmolVLM needs beside what it shares with Idefics3, see `test_idefics3.py`."""

import importlib

from transformers.models.smolvlm import processing_smolvlm

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm import smolvlm


def test_the_processor_needs_no_num2words(checkpoint, noise, monkeypatch):
    folder = checkpoint("smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    importlib.reload(smolvlm)
    encoded = Pipeline(str(folder)).encoder.encode([noise((100, 100))])[0]
    assert encoded.prompt["placeholder"].count("<row_") == 16
