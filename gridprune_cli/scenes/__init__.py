"""Scenes, questions about them, and the two checkpoints that answer these: the embedded model and its localiser."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LOCALIZER = Path(__file__).parent / "localizer"
