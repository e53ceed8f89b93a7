"""Which checkpoint a model's name means, and what identifies its contents."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import LocalEntryNotFoundError

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.scenes import CHECKPOINT, LOCALIZER
from gridprune_cli.vlm import hub
from gridprune_cli.vlm.identity import identify_folder
from gridprune_cli.vlm.weights import SAFE, weight_files

if TYPE_CHECKING:
    from gridprune_cli.cache.store import Store

EMBEDDED = "scenes"
EMBEDDED_LOCALIZER = "scenes-localizer"

CLIP_TOWER = "clip_vision_model"
# the model_type of a vision tower -> that of the model with a text tower which such towers are taken from
_TEXT_TOWERS = {
    CLIP_TOWER: "clip",
    "siglip_vision_model": "siglip",
    "idefics3_vision": "siglip",
    "smolvlm_vision": "siglip",
}
CLIP_NAMES = {"clip": "CLIP", "siglip": "SigLIP"}  # as errors write them
_KNOWN_TOWERS = {  # the CLIP on the hub that towers were taken from: what their config says
    "openai/clip-vit-large-patch14-336": {
        "model_type": CLIP_TOWER,
        "hidden_size": 1024,
        "patch_size": 14,
        "image_size": 336,
        "num_hidden_layers": 24,
    },
}
_TOWER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
)
# SigLIP's towers are used at other image sizes than its own, with position embeddings to fit (Gemma 3 at 896 pixels,
# PaliGemma at 448), and with the last layer left out (the LLaVA models): neither changes what scores patches
_FREE_OF_SIGLIP = ("image_size", "num_hidden_layers")


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

    @cached_property
    def clip_tower(self) -> Any:
        """The config of its vision tower, with the values that it leaves out, where that is a CLIP's or SigLIP's.

        None where it is neither.
        """
        from transformers import AutoConfig

        tower = getattr(AutoConfig.from_pretrained(self.folder, local_files_only=True), "vision_config", None)
        return tower if getattr(tower, "model_type", None) in _TEXT_TOWERS else None

    @property
    def clip_kind(self) -> str | None:
        """Of which kind of model with a text tower its vision tower is: "clip", "siglip", or None for neither."""
        return None if self.clip_tower is None else _TEXT_TOWERS[self.clip_tower.model_type]

    @property
    def stored(self) -> str:
        """The dtype of its weights, as its config says; older ones call it `torch_dtype`, and some say it per part."""
        for config in (self.config, self.config.get("text_config") or {}):
            if dtype := config.get("dtype") or config.get("torch_dtype"):
                return dtype
        return "float32"

    @property
    def repo(self) -> str:
        """The name of a hub model."""
        return self.name.partition("@")[0]

    @cached_property
    def identity(self) -> str:
        """Name and commit of a hub model, whose files never change; for a folder a digest of its files."""
        return f"hub:{self.repo}@{self.commit}" if self.commit else identify_folder(self.folder, self.store)

    def complete(self, field: str | None = "model") -> "Checkpoint":
        """Fetches what is missing of a hub model. Raises BadInput where there are no weights that may be read.

        `field` is the setting that named it, which errors name too; None where it was not named, as a known CLIP.
        """
        if self.commit:
            subject = _subject(self.repo, field)
            hub.fetch(self.repo, self.commit, subject, bars=bool(self.lacks()))
            if not any(path.suffix == SAFE for path in weight_files(self.folder)):  # the repository has none
                hub.fetch(self.repo, self.commit, subject, bars=bool(self.lacks()), patterns=hub.PICKLED)
        if lacks := self.lacks():
            raise BadInput(lacks, **_subject(self.name, field))
        return self

    def lacks(self) -> str:
        """What is wrong with the weights on disk; empty where nothing is."""
        if (self.folder / "adapter_config.json").is_file():
            return "has an adapter (adapter_config.json), and adapters are not applied; merge it into the weights first"
        paths = weight_files(self.folder)
        if not paths:
            online = ", or go online if it has them" if self.commit else ""
            return (
                f"no weights as model.safetensors or pytorch_model.bin, or their shards; name a copy that has{online}"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            return f"{len(missing)} of {len(paths)} files of weights missing (first: {missing[0]}); fetch them"
        return ""


def _subject(name: str, field: str | None) -> dict[str, str]:
    """How an error names a checkpoint: by the setting that did, or as the CLIP that nobody named."""
    return {"field": field, "value": name} if field else {"place": f"the CLIP {name}"}


def find(model: str, revision: str | None = None, *, field: str = "model", store: "Store | None" = None) -> Checkpoint:
    """The checkpoint of a name: `scenes`, a folder, or a hub name, `owner/name` or `owner/name@revision`.

    Of a hub model only config.json is fetched; `complete` fetches the rest. Raises BadInput, naming the setting
    `field`, where there is no such model, and GridpruneError where the hub can't be asked.
    """
    embedded = {EMBEDDED: CHECKPOINT, EMBEDDED_LOCALIZER: LOCALIZER}.get(model)
    folder = embedded or Path(os.path.expanduser(model))
    repo, _, named = model.partition("@")
    commit = None
    if embedded is None and hub.is_name(repo) and not os.path.exists(folder):
        if revision and named and revision != named:
            raise BadInput(f"`{field}={model}` names another one", field="revision", value=revision)
        revision = revision or named or None
        folder = hub.locate(repo, revision, _subject(repo, field))
        model, commit = f"{repo}@{revision}" if revision else repo, folder.name
    elif revision:
        reason = f"only models from the hub have revisions, `{field}={model}` is a folder"
        raise BadInput(reason, field="revision", value=revision)
    if not os.path.isfile(folder / "config.json"):
        reason = "no folder with a config.json; `gridprune models` lists what can be named"
        raise BadInput(reason, field=field, value=model)
    try:
        checkpoint = Checkpoint(model, folder, commit, store)
        if not isinstance(checkpoint.config, dict) or not isinstance(checkpoint.family, str):
            raise ValueError("not an object with a text as model_type")
    except (ValueError, KeyError, RecursionError) as fault:
        raise BadInput(f"config.json names no model_type ({fault})", field=field, value=model) from fault
    return checkpoint


def model_key(model: str) -> str:
    """What a model is remembered by: a folder by its whole path, from wherever it is named; any other by its name."""
    folder = os.path.expanduser(model)
    embedded = model in (EMBEDDED, EMBEDDED_LOCALIZER)
    return os.path.realpath(folder) if os.path.isdir(folder) and not embedded else model


def find_clip(checkpoint: Checkpoint, named: str | None = None) -> Checkpoint:
    """The CLIP or SigLIP checkpoint that a model's tower was taken from, for relevance.

    It is what the user named; else the sub-folder `clip`; else, for towers that are known, the one on the hub, which is
    fetched where it is not here. Raises BadInput where there is none of these, or it can't be the tower's.
    """
    if checkpoint.clip_kind is None:
        reason = f"the tower of {checkpoint.name} is no CLIP or SigLIP; leave `clip` out"
        raise BadInput(reason, field="clip", value=named)
    if named:
        clip = find(named, field="clip", store=checkpoint.store)
        _check_clip(clip, checkpoint, _subject(named, "clip"))
        return clip.complete("clip")
    if (checkpoint.folder / "clip" / "config.json").is_file():
        clip = Checkpoint(f"{checkpoint.name}/clip", checkpoint.folder / "clip", store=checkpoint.store)
        _check_clip(clip, checkpoint, {"place": clip.name})
        return clip.complete()
    tower = checkpoint.clip_tower.to_dict()
    repo = next((name for name, sizes in _KNOWN_TOWERS.items() if sizes.items() <= tower.items()), None)
    if repo is None:
        raise BadInput(
            f"which {CLIP_NAMES[checkpoint.clip_kind]} its tower was taken from is not known; name it as `clip`, or "
            "take `relevance=attention`",
            place=checkpoint.name,
        )
    return _known_clip(repo)


def _known_clip(repo: str) -> Checkpoint:
    """A CLIP on the hub. What lies whole in the hub's cache is taken as it is, without asking whether it changed."""
    try:
        folder = hub.locate(repo, None, _subject(repo, None), cached=True)
        clip = Checkpoint(repo, folder, folder.name)
        if not clip.lacks() and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return clip
    except GridpruneError:  # not here yet
        pass
    try:
        folder = hub.locate(repo, None, _subject(repo, None))
        return Checkpoint(repo, folder, folder.name).complete(None)
    except GridpruneError as fault:
        unreachable = isinstance(fault.__cause__, LocalEntryNotFoundError)
        kind = BadInput if unreachable else type(fault)
        raise kind(
            f"{fault.reason}; relevance comes from it: go online without HF_HUB_OFFLINE, name a copy as `clip=FOLDER`, "
            "or take `relevance=attention`",
            place=fault.place,
        ) from fault


def _check_clip(clip: Checkpoint, checkpoint: Checkpoint, subject: dict[str, str]) -> None:
    """Raises BadInput, about a subject, where the tower of a model can't have been taken from a CLIP or SigLIP."""
    kind = checkpoint.clip_kind
    assert kind is not None
    name = CLIP_NAMES[kind]
    if clip.family != kind:
        raise BadInput(f"model type {clip.family!r} is no {name} with a text tower; name another", **subject)
    from transformers import AutoConfig

    # 1. what must be equal: (of the CLIP, of the model's tower)
    config, tower = AutoConfig.from_pretrained(clip.folder, local_files_only=True), checkpoint.clip_tower
    pairs = {size: (getattr(config.vision_config, size), getattr(tower, size)) for size in _TOWER_SIZES}
    if kind == "siglip":
        layers = pairs["num_hidden_layers"]
        for size in _FREE_OF_SIGLIP:
            del pairs[size]
        if layers[0] < layers[1]:
            pairs["num_hidden_layers"] = layers
        if not config.vision_config.vision_use_head:
            reason = "its vision tower has no pooling head, by which patches are scored; name a copy that has it"
            raise BadInput(reason, **subject)
    else:
        # many configs repeat in their tower's the width that CLIP's two halves meet in
        stated = checkpoint.tower.get("projection_dim")
        if stated not in (None, config.projection_dim, config.vision_config.projection_dim):
            pairs["projection_dim"] = config.projection_dim, stated
    # 2. the first that is not
    for size, (clip_value, tower_value) in pairs.items():
        if clip_value != tower_value:
            raise BadInput(
                f"can't be the {name} of this tower: its {size} is {clip_value}, that of {checkpoint.name} "
                f"{tower_value}; name the {name} that the tower was taken from as `clip`, or take "
                "`relevance=attention`",
                **subject,
            )
