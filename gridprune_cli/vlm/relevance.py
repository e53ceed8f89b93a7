"""What relevance comes from: a model's CLIP or SigLIP, its language model's attention, or its word embeddings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from gridprune_cli.choices import Relevance
from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance, weights_differ
from gridprune_cli.vlm.parts import ModelParts
from gridprune_cli.vlm.siglip import SiglipRelevance
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
    """What a model family adds to its parts for relevance to a question.

    patches_normed  whether the tower's patches in its vision features are behind the tower's last layer norm; None
                    where they are no patches of the tower any more, so that no SigLIP can score them
    """

    patches_normed: ClassVar[bool | None] = None

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
        if relevance == "clip" and (reason := self._no_text_tower(checkpoint)):
            raise BadInput(f"{reason}; use `relevance=attention`", field="relevance", value=relevance)
        super().__init__(checkpoint, dtype, device, sharded)
        self._relevance = relevance
        if clip is not None:
            self.clip = clip

    @classmethod
    def _no_text_tower(cls, checkpoint: Checkpoint) -> str:
        """Why no CLIP or SigLIP can score the visual tokens of a checkpoint; empty where one can."""
        if checkpoint.clip_kind is None:
            return f"the tower of {checkpoint.name} is no CLIP or SigLIP"
        if checkpoint.clip_kind == "siglip" and cls.patches_normed is None:
            return f"{checkpoint.name} mixes its tower's patches behind the projector, so no SigLIP can score them"
        return ""

    def take_clip(self, named: str) -> None:
        """Takes relevance from the CLIP or SigLIP that a user named, which is fetched where it is not here.

        Raises BadInput where it can't be the tower's, or nothing of this kind can score this model's visual tokens.
        """
        if reason := self._no_text_tower(self.checkpoint):
            raise BadInput(f"{reason}; leave `clip` out", field="clip", value=named)
        self.clip = find_clip(self.checkpoint, named)

    @abstractmethod
    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """What stands for visual tokens `(K, C)` where text has its embeddings: `(K, D)`."""

    @cached_property
    def relevance_kind(self) -> str:
        """Where relevance comes from: "clip", "siglip", "attention" or "words".

        It is a SigLIP's only where it was named, or asked for by `relevance="clip"`: how good it is was not measured.
        """
        if self._relevance in ("attention", "words"):
            return self._relevance
        kind = self.checkpoint.clip_kind
        if kind == "clip" or self._relevance == "clip" or vars(self).get("clip"):
            assert kind is not None
            return kind
        return "attention"

    @cached_property
    def relevance(self) -> ClipRelevance | WordRelevance:
        """Gives the relevance `(N,)` of vision features `(N, C)` to a question, by CLIP, SigLIP or words.

        Raises as `clip`.

        Raises TypeError where it comes from attention, which is that of a whole prompt: see `vlm.attention_relevance`.
        """
        if self.relevance_kind == "attention":
            raise TypeError("relevance from attention is that of a prompt, not of vision features and a question")
        if self.clip is None:
            return self.vocabulary
        if self.relevance_kind == "siglip":
            return SiglipRelevance(self.clip, self.dtype, self.device, normed=bool(self.patches_normed))
        return ClipRelevance(self.clip, self.dtype, self.device)

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
        """The CLIP or SigLIP that relevance comes from, or None where none is. It is fetched where it is not here.

        Raises BadInput where it is not known, is not the tower's, or can't be had, GridpruneError where the hub fails.
        """
        return find_clip(self.checkpoint) if self.relevance_kind in ("clip", "siglip") else None

    @property
    def relevance_source(self) -> dict[str, Any]:
        """What relevance comes from, as results say it. Raises as `clip`."""
        return {"source": self.relevance_kind, "model": self.clip.name if self.clip else None}

    @cached_property
    def tower_differs(self) -> bool:
        """Whether the tower's weights are seen to differ from those of the CLIP that relevance comes from."""
        return self.clip is not None and weights_differ(self.checkpoint.folder, self.clip.folder)
