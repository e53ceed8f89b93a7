"""What relevance comes from: the CLIP that a model's tower was taken from, or the language model's own words."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance, weights_differ
from gridprune_cli.vlm.parts import ModelParts
from gridprune_cli.vlm.word_relevance import WordRelevance

RELEVANCE = ("auto", "clip", "words")  # what it may come from; "auto" is CLIP where the tower is a CLIP's, else words


class RelevanceSource(ModelParts, ABC):
    """What a model family adds to its parts for relevance to a question."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str,
        clip: Checkpoint | None = None,
        sharded: bool = False,
        relevance: str = "auto",
    ):
        """`clip` is the CLIP that relevance comes from, where it is known already. Raises BadInput for a source of
        relevance that the model does not have.
        """
        if relevance not in RELEVANCE:
            raise BadInput(f"not one of {', '.join(RELEVANCE)}", field="relevance", value=relevance)
        if relevance == "clip" and checkpoint.clip_tower is None:
            reason = f"the tower of {checkpoint.name} is no CLIP; use `relevance=words`"
            raise BadInput(reason, field="relevance", value=relevance)
        super().__init__(checkpoint, dtype, device, sharded)
        self._relevance = relevance
        if clip is not None:
            self.clip = clip

    @abstractmethod
    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """What stands for visual tokens `(K, C)` where text has its embeddings: `(K, D)`."""

    @cached_property
    def relevance(self) -> ClipRelevance | WordRelevance:
        """Gives the relevance `(N,)` of vision features `(N, C)` to a question. Raises as `clip`."""
        return ClipRelevance(self.clip, self.dtype, self.device) if self.clip else self.vocabulary

    @cached_property
    def vocabulary(self) -> WordRelevance:
        """The embedding table of the language model."""
        return WordRelevance(self, self.text_embeds)

    @cached_property
    def relevance_by_words(self) -> bool:
        """Whether relevance comes from words, not from CLIP."""
        return self._relevance == "words" or self.checkpoint.clip_tower is None

    @cached_property
    def clip(self) -> Checkpoint | None:
        """The CLIP that relevance comes from, or None where words are. It is fetched where it is not here.

        Raises BadInput where it is not known, is not the tower's, or can't be had, GridpruneError where the hub fails.
        """
        return None if self.relevance_by_words else find_clip(self.checkpoint)

    @property
    def relevance_source(self) -> dict[str, Any]:
        """What relevance comes from, as results say it. Raises as `clip`."""
        return {"source": "clip" if self.clip else "words", "model": self.clip.name if self.clip else None}

    @cached_property
    def tower_differs(self) -> bool:
        """Whether the tower's weights are seen to differ from those of the CLIP that relevance comes from."""
        return self.clip is not None and weights_differ(self.checkpoint.folder, self.clip.folder)
