"""What a model family must say of itself, so that everything else is written once.

A checkpoint is loaded in parts: `tower` (encoding), `projector` (pruning), `language` (generating). A part that is not
asked for is never read from disk.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.clip import ClipRelevance
from gridprune_cli.vlm.loading import load_part

PARTS = ("tower", "projector", "language")


@dataclass(frozen=True)
class Encoding:
    """What the tower gave for one picture: the tensors of an `EncodedImage`, without where it came from."""

    states: Tensor  # (N, C)
    saliency: Tensor  # (N,)
    views: tuple[View, ...]
    prompt: dict[str, Any] = field(default_factory=dict)


class Family(ABC):
    """One model family over one checkpoint. Sub-classes are small; see `llava.py` for the plainest."""

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[Any]
    modules: ClassVar[dict[str, tuple[str, ...]]]  # part -> dotted paths of its sub-modules
    version: ClassVar[int] = 1  # part of every cache key: raise it when `encode` changes what it gives

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._loaded: dict[str, Any] = {}

    # ---- parts -------------------------------------------------------------------------------------------------------

    def load(self, *parts: str) -> Any:
        """A model that holds at least these parts. Parts asked for together are read together."""
        if not all(part in self._loaded for part in parts):
            without = [path for part in PARTS if part not in parts for path in self.modules[part]]
            model = load_part(self.model_class, self.checkpoint.folder, without, self.dtype, self.device)
            self._prepare(model, parts)
            self._loaded |= dict.fromkeys(parts, model)
        return self._loaded[parts[0]]

    def _prepare(self, model: Any, parts: Sequence[str]) -> None:  # noqa: B027  (most families need nothing)
        """Sets what must be set on a freshly loaded model."""

    @cached_property
    def processor(self) -> Any:
        return self.processor_class.from_pretrained(self.checkpoint.folder, local_files_only=True)

    @cached_property
    def relevance(self) -> ClipRelevance | None:
        """Gives the relevance `(N,)` of states `(N, C)` to a question; None where the checkpoint has no text tower."""
        clip = self.checkpoint.clip
        return ClipRelevance(clip, self.dtype, self.device) if clip else None

    # ---- encoding ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """What an encoded image depends on besides the picture. Holds no path and no file name of the user's."""
        settings = json.dumps(self.processor.image_processor.to_dict(), sort_keys=True, default=str)
        return {
            "family": self.checkpoint.family,
            "checkpoint": self.checkpoint.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processor": hashlib.sha256(settings.encode()).hexdigest(),
            "backend": type(self.processor.image_processor).__name__,
            "version": self.version,
        }

    @abstractmethod
    def encode(self, pictures: Sequence[Image]) -> list[Encoding]:
        """Runs the tower on pictures. Loads the tower only."""

    # ---- pruning -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """Rows that the language model receives `(K, D)` for states `(K, C)`, row by row. Loads the projector only."""

    @abstractmethod
    def write_prompt(self, question: str, encoded: EncodedImage) -> Tensor:
        """Token ids `(L,)` of the model's own chat prompt, with one image token per visual token of the picture."""

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a visual token in a prompt."""
        return self.checkpoint.config["image_token_index"]

    def positions(self, ids: Tensor) -> Tensor:
        """Position ids `(L,)` of an unpruned prompt."""
        return torch.arange(len(ids))

    # ---- generating --------------------------------------------------------------------------------------------------

    @abstractmethod
    def features(self, batch: Sequence[PrunedSet]) -> Any:
        """The rows of pruned sets in the container in which this family's `generate` takes encoder outputs.

        A new one at each call: `generate` changes what it is given.
        """
