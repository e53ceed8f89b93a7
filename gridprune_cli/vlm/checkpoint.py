"""Which checkpoint a model's name means, and what identifies its contents."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gridprune_cli.errors import BadInput
from gridprune_cli.scenes import CHECKPOINT

EMBEDDED = "scenes"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    name: str  # as the user named it
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text("utf-8"))

    @property
    def family(self) -> str:
        return self.config["model_type"]

    @cached_property
    def identity(self) -> str:
        """sha256 over the names and contents of all config and weight files of the folder, not of its sub-folders."""
        total = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt") and path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(f"{path.name}\0{digest}\n".encode())
        return total.hexdigest()

    @property
    def clip(self) -> "Checkpoint | None":
        """The companion CLIP checkpoint, in the sub-folder `clip`."""
        folder = self.folder / "clip"
        return Checkpoint(f"{self.name}/clip", folder) if (folder / "config.json").is_file() else None


def find(model: str) -> Checkpoint:
    """The checkpoint of a name: `scenes`, or a folder. Raises BadInput where there is none."""
    folder = CHECKPOINT if model == EMBEDDED else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise BadInput(f"--model {model}: no folder with a config.json; `gridprune models` lists what can be named")
    try:
        checkpoint = Checkpoint(model, folder)
        _ = checkpoint.family
    except (ValueError, KeyError) as fault:
        raise BadInput(f"--model {model}: config.json names no model_type ({fault})") from fault
    return checkpoint
