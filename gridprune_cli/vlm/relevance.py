"""What relevance comes from: a model's CLIP or SigLIP, its language model's attention, or its word embeddings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from gridprune_cli.choices import Relevance
from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import CLIP_NAMES, Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance, weights_differ
from gridprune_cli.vlm.parts import ModelParts
from gridprune_cli.vlm.siglip import SiglipRelevance
from gridprune_cli.vlm.word_relevance import WordRelevance

# What it may come from. "auto" is CLIP where the tower is a CLIP's, else attention. "words" are taken by name alone: on
# the synthetic scenes, the best tokens by words give fewer right answers than random ones
RELEVANCE = get_args(Relevance)
PUBLISHED_SIGN = -1  # of CLIP's relevance, in the published code of methods that turn it round
FULL = "full_attention"  # the kind of layers without a sliding window


@dataclass(frozen=True)
class Calibration:
    """What is chosen for one model, by `gridprune calibrate` or by hand.

    relevance        what it comes from where `relevance=auto`, one of `RELEVANCE`
    relevance_depth  layers that a question goes through, for relevance from attention; None: `middle_depth`
    relevance_sign   1 or -1, what methods that leave the sign to the model multiply CLIP's relevance with; None: -1, as
                     published for the methods that have one
    """

    relevance: str = "auto"
    relevance_depth: int | None = None
    relevance_sign: int | None = None


def middle_depth(kinds: Sequence[str]) -> int:
    """How many of a language model's layers, by their kinds, a question goes through for relevance from attention.

    Half of them, and on to the next that attends to everything where the last has a sliding window. On the synthetic
    scenes, top-k by layer 2 of 6 (half: the third) keeps 98 / 96 / 90 % of the answers at 28 / 13 / 5 of 256 tokens;
    layer 1 only 95 / 87 / 67 %, since it attends to all objects alike. Of real models it is not measured.
    """
    return _full_depth(kinds, len(kinds) // 2)


def candidate_depths(kinds: Sequence[str]) -> tuple[int, ...]:
    """Depths that are tried for a language model of layers of these kinds, ascending: each eighth up to three quarters.

    A question that has been through all layers could have been answered, so that is none of them.
    """
    depths = {_full_depth(kinds, len(kinds) * eighths // 8) for eighths in range(1, 7)}
    return tuple(sorted(depths - {len(kinds)}))


def _full_depth(kinds: Sequence[str], depth: int) -> int:
    """The depth, at least 1, or the next whose last layer attends to everything, where there is one."""
    depth = max(1, depth)
    return next((layer + 1 for layer in range(depth - 1, len(kinds)) if kinds[layer] == FULL), depth)


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
        quantize: str | None = None,
    ):
        """`clip` is the CLIP that relevance comes from, where it is known already. Raises BadInput for a source of
        relevance that the model does not have.
        """
        super().__init__(checkpoint, dtype, device, sharded, quantize)
        self._check_relevance(relevance)
        self._relevance = relevance
        self.calibration = Calibration()
        self._named_clip = clip

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
        self._named_clip = find_clip(self.checkpoint, named)

    def _check_relevance(self, relevance: Any) -> None:
        """Raises BadInput for what relevance can't come from."""
        if relevance not in RELEVANCE:
            raise BadInput(f"not one of {', '.join(RELEVANCE)}", field="relevance", value=relevance)
        if relevance in ("clip", "both") and (reason := self._no_text_tower(self.checkpoint)):
            raise BadInput(f"{reason}; use `relevance=attention`", field="relevance", value=relevance)

    @abstractmethod
    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """What stands for visual tokens `(K, C)` where text has its embeddings: `(K, D)`."""

    @cached_property
    def relevance_kind(self) -> str:
        """Where relevance comes from: "clip", "siglip", "attention", "both" or "words".

        "both" is CLIP's or SigLIP's and attention. It is a SigLIP's only where it was named, or asked for by
        `relevance="clip"` or `"both"`: how good it is was not measured.
        """
        source = next((s for s in (self._relevance, self.calibration.relevance) if s != "auto"), "auto")
        if source in ("attention", "both", "words"):
            return source
        kind = self.checkpoint.clip_kind
        if kind == "clip" or source == "clip" or self._named_clip:
            assert kind is not None
            return kind
        return "attention"

    @property
    def needs_layers(self) -> bool:
        """Whether relevance needs the first layers of the language model, which a whole prompt goes through."""
        return self.relevance_kind in ("attention", "both")

    def calibrate(self, calibration: Calibration) -> None:
        """Takes what was chosen for this model. Raises BadInput, with the setting, for what it can't be."""
        layers, depth, sign = len(self._layer_kinds), calibration.relevance_depth, calibration.relevance_sign
        self._check_relevance(calibration.relevance)
        if depth is not None and (type(depth) is not int or not 1 <= depth <= layers):
            reason = f"the language model has {layers} layers; give a number from 1 to that"
            raise BadInput(reason, field="relevance_depth", value=depth)
        if sign is not None and (type(sign) is not int or sign not in (1, -1)):
            raise BadInput("must be 1 or -1", field="relevance_sign", value=sign)
        before = self.relevance_kind
        self.calibration = calibration
        for name in ("relevance_kind", "relevance_depth"):
            vars(self).pop(name, None)
        if self.relevance_kind != before:
            for name in ("relevance", "clip", "tower_differs"):
                vars(self).pop(name, None)

    def relevance_choices(self) -> list[Calibration]:
        """What relevance may come from: what it does come from first, then what else `gridprune calibrate` tries.

        That is CLIP, where the tower has one, and attention at `candidate_depths`; the named one of them alone.
        """
        source = "clip" if self.relevance_kind == "siglip" else self.relevance_kind
        in_force = Calibration(source, self.relevance_depth if self.needs_layers else None)
        depths = {*candidate_depths(self._layer_kinds), middle_depth(self._layer_kinds), self.relevance_depth}
        choices = {
            "clip": [Calibration("clip")] if "clip" in (self.checkpoint.clip_kind, in_force.relevance) else [],
            "attention": [Calibration("attention", depth) for depth in sorted(depths)],
            "both": [Calibration("both", depth) for depth in sorted(depths)] if source == "both" else [],
        }
        listed = [
            choice for kind, of_kind in choices.items() if self._relevance in ("auto", kind) for choice in of_kind
        ]
        return [in_force, *(choice for choice in listed if choice != in_force)]

    @cached_property
    def relevance(self) -> ClipRelevance | WordRelevance:
        """Gives the relevance `(N,)` of vision features `(N, C)` to a question, by CLIP, SigLIP or words.

        Of relevance from both it is CLIP's or SigLIP's. Raises as `clip`, and TypeError where it comes from attention,
        which is that of a whole prompt: see `vlm.attention_relevance`.
        """
        if self.relevance_kind == "attention":
            raise TypeError("relevance from attention is that of a prompt, not of vision features and a question")
        if self.clip is None:
            return self.vocabulary
        if self.checkpoint.clip_kind == "siglip":
            return SiglipRelevance(self.clip, self.dtype, self.device, normed=bool(self.patches_normed))
        return ClipRelevance(self.clip, self.dtype, self.device)

    def patch_lengths(self, vision_features: Tensor) -> Tensor:
        """How long the patches of vision features `(N, C)` are that relevance compares with texts: `(N,)` float32.

        Raises as `clip`, and TypeError where relevance does not come from CLIP or SigLIP alone.
        """
        if self.relevance_kind not in CLIP_NAMES or not isinstance(self.relevance, ClipRelevance):
            raise TypeError(f"relevance from {self.relevance_kind} compares no patches with texts")
        return self.relevance.patch_lengths(vision_features)

    def load_relevance(self, *, layers: bool = True) -> None:
        """Loads what relevance comes from, now. Raises as `clip`.

        Without `layers` not the language model's first ones: who loads all of it has them then.
        """
        if self.needs_layers and layers:
            self.first_layers(self.relevance_depth)
        if self.relevance_kind != "attention":
            self.relevance.load()

    @cached_property
    def relevance_depth(self) -> int:
        """How many layers of the language model a question goes through, where relevance comes from attention."""
        return self.calibration.relevance_depth or middle_depth(self._layer_kinds)

    @property
    def _layer_kinds(self) -> Sequence[str]:
        """The kind of each layer of the language model."""
        text = self.text_config
        return getattr(text, "layer_types", None) or [FULL] * text.num_hidden_layers

    @property
    def relevance_sign(self) -> int:
        """What methods that leave the sign of relevance to the model multiply it with, 1 or -1."""
        return (self.calibration.relevance_sign or PUBLISHED_SIGN) if self.relevance_kind == "clip" else 1

    @cached_property
    def vocabulary(self) -> WordRelevance:
        """The embedding table of the language model."""
        return WordRelevance(self, self.text_embeds)

    @cached_property
    def clip(self) -> Checkpoint | None:
        """The CLIP or SigLIP that relevance comes from, or None where none is. It is fetched where it is not here.

        Raises BadInput where it is not known, is not the tower's, or can't be had, GridpruneError where the hub fails.
        """
        if self.relevance_kind in ("attention", "words"):
            return None
        return self._named_clip or find_clip(self.checkpoint)

    @property
    def knows_clip(self) -> bool:
        """Whether `clip` was named, or looked for already."""
        return self._named_clip is not None or "clip" in vars(self)

    @property
    def relevance_source(self) -> dict[str, Any]:
        """What relevance comes from, as results have it, with the depth of attention. Raises as `clip`."""
        depth = {"depth": self.relevance_depth} if self.needs_layers else {}
        return {"source": self.relevance_kind, "model": self.clip.name if self.clip else None} | depth

    @cached_property
    def tower_differs(self) -> bool:
        """Whether the tower's weights are seen to differ from those of the CLIP that relevance comes from."""
        return self.clip is not None and weights_differ(self.checkpoint.folder, self.clip.folder)
