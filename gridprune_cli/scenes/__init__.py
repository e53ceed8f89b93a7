"""The embedded model: scenes and questions about them, the checkpoint, how it was trained and measured."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LOCALIZER = Path(__file__).parent / "localizer"
