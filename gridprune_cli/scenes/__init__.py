"""The embedded model: scenes, questions about them, the checkpoint that answers, and how it was trained and measured."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
