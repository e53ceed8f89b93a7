"""What a pruning method may look at: where each visual token lies, and what is known about it."""

from dataclasses import dataclass

import torch
from torch import Tensor

# What an entry of the cache holds only where a method needs it: `EncodedImage.optional`, fields of `Signals`
TOWER_SIGNALS = ("received_attention", "middle_attention")  # of the vision tower
OPTIONAL_SIGNALS = (*TOWER_SIGNALS, "entropy")

Box = tuple[int, int, int, int]  # inclusive x0, y0, x1, y1 on CROP's 8 x 8 grid over the picture


@dataclass(frozen=True)
class View:
    """One tile of an encoding: its grid of rows x cols tokens, and the part of the picture that the grid covers.

    `box` is `(left, top, right, bottom)` in fractions of the picture; it leaves 0..1 where the tile was padded.
    """

    rows: int
    cols: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def count(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Signals:
    """One image and one question, as a method sees them. N visual tokens: the views in turn, each row-major.

    relevance           (N,)    how much a token has to do with the question, in -1..1
    saliency            (N,)    how much the vision tower attends to it, >= 0
    region                      the contextual region, or None where there is none
    vision_features     (N, C)  what the vision tower gave
    image_embeds        (N, D)  what the language model receives
    question_embeds     (M, D)  the language model's embeddings of the question's tokens, without stop words
    received_attention  (N,)    mean attention of all tokens of the tower to it, in the layer of the vision features
    middle_attention    (N,)    the same in a middle layer of the tower
    entropy             (N,)    of the picture's grey levels in the token's rectangle, in bits
    importance          (N,)    score of CoViPAL's trained module, unbounded
    patch_lengths       (N,)    length of its patch in the common space of CLIP or SigLIP, before relevance makes it 1
    relevance_sign              what methods that leave the sign to the model multiply relevance with: -1 as published
                                for CLIP's, 1 for SigLIP's, that of the language model, and "both"
    relevance_kind              what relevance comes from: "clip", "siglip", "attention", "both" or "words"
    """

    views: tuple[View, ...]
    relevance: Tensor | None = None
    saliency: Tensor | None = None
    region: Box | None = None
    vision_features: Tensor | None = None
    image_embeds: Tensor | None = None
    question_embeds: Tensor | None = None
    received_attention: Tensor | None = None
    middle_attention: Tensor | None = None
    entropy: Tensor | None = None
    importance: Tensor | None = None
    patch_lengths: Tensor | None = None
    relevance_sign: int = -1
    relevance_kind: str = "clip"

    def __post_init__(self) -> None:
        """Raises ValueError where a signal has another length than the views, or values that are not finite."""
        for name in ("relevance", "saliency", "importance", "patch_lengths", *OPTIONAL_SIGNALS):
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != (self.count,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the views have {self.count} tokens")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} has values that are not finite")
        for name in ("vision_features", "image_embeds", "question_embeds"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != 2 or not value.numel() or (name != "question_embeds" and len(value) != self.count):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the views have {self.count} tokens")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} has values that are not finite")

    @property
    def count(self) -> int:
        """N."""
        return sum(view.count for view in self.views)

    def need(self, name: str) -> Tensor:
        """A signal by name, in float32 or wider. Raises ValueError where it was not computed."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this method needs {name}, which was not computed")
        return value if value.dtype == torch.float64 else value.float()
