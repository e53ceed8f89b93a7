"""What relevance comes from: the CLIP of a model's tower, the language model's attention, or its word embeddings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from gridprune_cli.choices import Relevance
from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance, weights_differ
from gridprune_cli.vlm.parts import ModelParts
from gridprune_cli.vlm.word_relevance import WordRelevance

# What it may come from. "auto" is CLIP where the tower is a CLIP's, else attention. "words" are taken by name alone: on
# the synthetic scenes, the best tokens by words give fewer right answers than random ones
RELEVANCE = get_args(Relevance)
_FULL = "full_attention"  # the kind of layers without a sliding window


def middle_depth(kinds: Sequence[str]) -> int:
    """How many of a language model's layers, by their kinds, a question goes through for relevance from attention.

    Half of them, and on to the next that attends to everything where the last has a sliding window. On the synthetic
    scenes, top-k by layer 2 of 6 (half: the third) keeps 98 / 96 / 90 % of the answers at 28 / 13 / 5 of 256 tokens;
    layer 1 only 95 / 87 / 67 %, since it attends to all objects alike. Of real models it is not measured.
    """
    half = max(1, len(kinds) // 2)
    return next((layer + 1 for layer in range(half - 1, len(kinds)) if kinds[layer] == _FULL), half)


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
            reason = f"the tower of {checkpoint.name} is no CLIP; use `relevance=attention`"
            raise BadInput(reason, field="relevance", value=relevance)
        super().__init__(checkpoint, dtype, device, sharded)
        self._relevance = relevance
        if clip is not None:
            self.clip = clip

    @abstractmethod
    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """What stands for visual tokens `(K, C)` where text has its embeddings: `(K, D)`."""

    @cached_property
    def relevance_kind(self) -> str:
        """Where relevance comes from: "clip", "attention" or "words"."""
        if self._relevance != "auto":
            return self._relevance
        return "attention" if self.checkpoint.clip_tower is None else "clip"

    @cached_property
    def relevance(self) -> ClipRelevance | WordRelevance:
        """Gives the relevance `(N,)` of vision features `(N, C)` to a question, by CLIP or by words. Raises as `clip`.

        Raises TypeError where it comes from attention, which is that of a whole prompt: see `vlm.attention_relevance`.
        """
        if self.relevance_kind == "attention":
            raise TypeError("relevance from attention is that of a prompt, not of vision features and a question")
        return ClipRelevance(self.clip, self.dtype, self.device) if self.clip else self.vocabulary

    def load_relevance(self) -> None:
        """Loads what relevance comes from, now. Raises as `clip`."""
        if self.relevance_kind == "attention":
            self.first_layers(self.relevance_depth)
        else:
            self.relevance.load()

    @cached_property
    def relevance_depth(self) -> int:
        """How many layers of the language model a question goes through, where relevance comes from attention."""
        text = self.config.get_text_config()
        return middle_depth(getattr(text, "layer_types", None) or [_FULL] * text.num_hidden_layers)

    @cached_property
    def vocabulary(self) -> WordRelevance:
        """The embedding table of the language model."""
        return WordRelevance(self, self.text_embeds)

    @cached_property
    def clip(self) -> Checkpoint | None:
        """The CLIP that relevance comes from, or None where none is. It is fetched where it is not here.

        Raises BadInput where it is not known, is not the tower's, or can't be had, GridpruneError where the hub fails.
        """
        return find_clip(self.checkpoint) if self.relevance_kind == "clip" else None

    @property
    def relevance_source(self) -> dict[str, Any]:
        """What relevance comes from, as results say it. Raises as `clip`."""
        return {"source": self.relevance_kind, "model": self.clip.name if self.clip else None}

    @cached_property
    def tower_differs(self) -> bool:
        """Whether the tower's weights are seen to differ from those of the CLIP that relevance comes from."""
        return self.clip is not None and weights_differ(self.checkpoint.folder, self.clip.folder)
