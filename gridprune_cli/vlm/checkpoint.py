"""Which checkpoint a model's name means, and what identifies its contents."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.scenes import CHECKPOINT, LOCALIZER
from gridprune_cli.vlm import hub
from gridprune_cli.vlm.identity import identify_folder

if TYPE_CHECKING:
    from gridprune_cli.store import Store

EMBEDDED = "scenes"
EMBEDDED_LOCALIZER = "scenes-localizer"

CLIP_TOWER = "clip_vision_model"
_KNOWN_TOWERS = {  # the CLIP on the hub that towers were taken from: what their config says
    "openai/clip-vit-large-patch14-336": {
        "model_type": CLIP_TOWER,
        "hidden_size": 1024,
        "patch_size": 14,
        "image_size": 336,
        "num_hidden_layers": 24,
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    name: str  # as the user named it, with its revision: `find` finds it again by it
    folder: Path
    commit: str | None = None  # of a snapshot of a hub model
    store: "Store | None" = field(default=None, compare=False)  # remembers the identity of a folder

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text("utf-8"))

    @property
    def family(self) -> str:
        return self.config["model_type"]

    @property
    def tower(self) -> dict[str, Any]:
        """The config of its vision tower, or nothing."""
        return self.config.get("vision_config") or {}

    @property
    def stored(self) -> str:
        """The dtype of its weights, as its config says; older ones call it `torch_dtype`, and some say it per part."""
        for config in (self.config, self.config.get("text_config") or {}):
            if found := config.get("dtype") or config.get("torch_dtype"):
                return found
        return "float32"

    @property
    def repo(self) -> str:
        """The name of a hub model."""
        return self.name.partition("@")[0]

    @cached_property
    def identity(self) -> str:
        """Name and commit of a hub model, whose files never change; for a folder a digest of its files."""
        return f"hub:{self.repo}@{self.commit}" if self.commit else identify_folder(self.folder, self.store)

    def complete(self, flag: str = "--model") -> "Checkpoint":
        """Fetches what is missing of a hub model. Raises BadInput where there are no weights that may be read."""
        if self.commit:
            hub.fetch(self.repo, self.commit, flag, bars=bool(self._lacks()))
        if lacks := self._lacks():
            raise BadInput(f"{flag} {self.name}: {lacks}")
        return self

    def _lacks(self) -> str:
        """What is wrong with the weights on disk."""
        if not any(self.folder.glob("*.safetensors")):
            reached = ", or go online if it has them" if self.commit else ""
            return (
                "no weights as *.safetensors; pickled ones are not read, since reading a pickle runs the code in it: "
                f"name a converted copy{reached}"
            )
        index = self.folder / "model.safetensors.index.json"
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return f"{index.name} can't be read; fetch it again"
        if away := [name for name in named if not isinstance(name, str) or os.path.basename(name) != name]:
            return f"{index.name} names {str(away[0])[:80]!r}, which is no file of this folder; fetch it again"
        missing = sorted(name for name in named if not (self.folder / name).is_file())
        if missing:
            return f"{len(missing)} of {len(named)} files of weights missing (first: {missing[0]}); fetch them"
        return ""


def find(model: str, revision: str | None = None, *, flag: str = "--model", store: "Store | None" = None) -> Checkpoint:
    """The checkpoint of a name: `scenes`, a folder, or a hub name, `owner/name` or `owner/name@revision`.

    Of a hub model only config.json is fetched; `complete` fetches the rest. Raises BadInput, naming the flag, where
    there is no such model, and GridpruneError where the hub can't be asked.
    """
    embedded = {EMBEDDED: CHECKPOINT, EMBEDDED_LOCALIZER: LOCALIZER}.get(model)
    folder = embedded or Path(model).expanduser()
    repo, _, named = model.partition("@")
    commit = None
    if embedded is None and hub.is_name(repo) and not folder.exists():
        if revision and named and revision != named:
            raise BadInput(f"--revision {revision}: {flag} {model} names another one")
        revision = revision or named or None
        folder = hub.locate(repo, revision, flag)
        model, commit = f"{repo}@{revision}" if revision else repo, folder.name
    elif revision:
        raise BadInput(f"--revision {revision}: only models from the hub have revisions, {flag} {model} is a folder")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{flag} {model}: no folder with a config.json; `gridprune models` lists what can be named")
    try:
        checkpoint = Checkpoint(model, folder, commit, store)
        if not isinstance(checkpoint.config, dict) or not isinstance(checkpoint.family, str):
            raise ValueError("not an object with a text as model_type")
    except (ValueError, KeyError, RecursionError) as fault:
        raise BadInput(f"{flag} {model}: config.json names no model_type ({fault})") from fault
    return checkpoint


def find_clip(checkpoint: Checkpoint, named: str | None = None) -> Checkpoint | None:
    """The CLIP checkpoint that a model's tower was taken from, for relevance, or None.

    It is what the user named; else the sub-folder `clip`; else, for towers that are known, what the hub's cache holds.
    Raises BadInput where what was named is no CLIP, or the model's tower is none.
    """
    if named:
        if checkpoint.tower.get("model_type") != CLIP_TOWER:
            raise BadInput(f"--clip {named}: the tower of {checkpoint.name} is no CLIP; leave --clip out")
        clip = find(named, flag="--clip")
        if clip.family != "clip":
            raise BadInput(f"--clip {named}: model type {clip.family!r} is no CLIP with a text tower; name another")
        return clip.complete("--clip")
    if (checkpoint.folder / "clip" / "config.json").is_file():
        return Checkpoint(f"{checkpoint.name}/clip", checkpoint.folder / "clip").complete()
    repo = next((name for name, said in _KNOWN_TOWERS.items() if said.items() <= checkpoint.tower.items()), None)
    if repo is None:
        return None
    try:
        folder = hub.locate(repo, None, "--clip", cached=True)
    except GridpruneError:  # not there, and nobody asked for it
        return None
    clip = Checkpoint(repo, folder, folder.name)
    return None if clip._lacks() else clip
