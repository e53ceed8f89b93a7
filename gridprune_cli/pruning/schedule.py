"""Pruning inside the language model: at which layer visual tokens leave the sequence, and by which rule.

A *stage* is a layer, a rule and a budget. What a rule may look at is measured at that layer by
`gridprune_cli.vlm.inner`; the rule itself is pure. A new rule is one class, here or beside the method that it is for,
and one line in `RULES` of `gridprune_cli.pruning.methods`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import View


@dataclass(frozen=True)
class Sight:
    """The visual tokens of one image, or of several that share a budget, at the input of a layer. n are still there.

    tokens     (n,) int64, ascending: which of the prompt's N visual tokens they are
    within     (n,) bool: whether inside the contextual region; false everywhere where there is no region
    views      those of all images of the prompt, whose N tokens they have in turn
    attention  (n,) float64, CPU: attention of the prompt's last token, or its raters, to each of them, softmax over all
               that is still there, mean over heads; in the layer that the rule names, None where it names none
    states     (n, D): their hidden states, None where the rule does not ask for them
    keys       (n, C): their keys, likewise
    text_states, text_keys  (m, D), (m, C): those of the prompt's text behind its last image, of which there may be none
    """

    tokens: Tensor
    within: Tensor
    views: tuple[View, ...] = ()
    attention: Tensor | None = None
    hidden_states: Tensor | None = None
    keys: Tensor | None = None
    text_hidden_states: Tensor | None = None
    text_keys: Tensor | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """Which tokens stay. Fields are options.

    attention  in which layer attention is measured: -1 the layer before the stage, 0 the stage's own, None in none
    rated      whether attention is not the last token's, but the mean of those tokens that `raters` names
    states     whether the rule looks at hidden states, after the norm that ends the language model
    keys       which keys it looks at, all heads side by side: -1 those that the layer before compares with, 0 what the
               stage's own layer projects, not yet turned by positions, None none
    """

    name: ClassVar[str]
    attention: ClassVar[int | None] = None
    rated: ClassVar[bool] = False
    hidden_states: ClassVar[bool] = False
    keys: ClassVar[int | None] = None

    @abstractmethod
    def pick(self, sight: Sight, k: int) -> Tensor:
        """Indices among the n, (k,) int64, sorted, for 0 <= k <= n."""

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """(m,) bool: whose attention counts, of the text behind the last image, (m, D), as the first layer gets it.

        `visual` (N, D) are the prompt's visual tokens there. Where none is named, the prompt's last token it is.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Attention(Rule):
    """The highest attention of the layer before: FastV (arXiv 2403.06764)."""

    name: ClassVar[str] = "attention"
    attention: ClassVar[int | None] = -1

    def pick(self, sight: Sight, k: int) -> Tensor:
        assert sight.attention is not None
        return top(sight.attention, k)


@dataclass(frozen=True)
class OwnAttention(Attention):
    """The highest attention of the stage's own layer, measured ahead of it: PyramidDrop (arXiv 2410.17247)."""

    name: ClassVar[str] = "own-attention"
    attention: ClassVar[int | None] = 0


@dataclass(frozen=True)
class Region(Rule):
    """Exactly what is inside the contextual region: CROP's inner pruning (arXiv 2505.21233). k must be its count."""

    name: ClassVar[str] = "region"

    def pick(self, sight: Sight, k: int) -> Tensor:
        return sight.within.nonzero()[:, 0]


@dataclass(frozen=True)
class RegionAttention(Rule):
    """What is inside the region first, then what is outside, each by the highest attention of the layer before.

    After CROP, which names neither a budget nor what happens where the region has another number of tokens: ours.
    """

    name: ClassVar[str] = "region-attention"
    attention: ClassVar[int | None] = -1

    def pick(self, sight: Sight, k: int) -> Tensor:
        assert sight.attention is not None
        return top(sight.attention + 2 * sight.within, k)  # attention is at most 1


@dataclass(frozen=True)
class Stage:
    """At the input of a layer, counted from 0, all but `keep` of the visual tokens leave.

    keep       how many stay, of each image, or of all together where it holds one number only
    positions  "original": what stays keeps its positions; "compact": it is numbered on from 0 from this layer on
    """

    layer: int
    rule: Rule
    keep: tuple[int, ...]
    positions: str = "original"

    def to_json(self) -> dict[str, Any]:
        rule = {"name": self.rule.name, **asdict(self.rule)}
        return {"layer": self.layer, "rule": rule, "keep": list(self.keep), "positions": self.positions}

    @classmethod
    def from_json(cls, parts: dict[str, Any]) -> "Stage":
        """Raises KeyError or TypeError for what is no stage of this version."""
        from gridprune_cli.pruning.methods import RULES  # which stands on this module

        options = dict(parts["rule"])
        rule = RULES[options.pop("name")](**options)
        return cls(parts["layer"], rule, tuple(parts["keep"]), parts["positions"])


@dataclass(frozen=True)
class LayerSchedule:
    """All stages of a prompt, in the order of their layers, and what they come to.

    tokens  visual tokens in each layer of the language model
    """

    stages: tuple[Stage, ...]
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        mean = round(sum(self.tokens) / len(self.tokens), 2)
        return {"stages": [stage.to_json() for stage in self.stages], "tokens": list(self.tokens), "mean": mean}

    @classmethod
    def from_json(cls, parts: dict[str, Any]) -> "LayerSchedule":
        return cls(tuple(Stage.from_json(stage) for stage in parts["stages"]), tuple(parts["tokens"]))

    def __str__(self) -> str:
        return ", ".join(f"{sum(stage.keep)} from layer {stage.layer} on" for stage in self.stages)


def plan(stages: Sequence[Stage], present: Sequence[int], depth: int) -> LayerSchedule:
    """Stages with budgets no larger than what is there, for `present` tokens per image (or in all) and `depth` layers.

    `present` must be as long as every stage's `keep`, layers below `depth` and ascending; of stages at the same layer
    the last one counts.
    """
    there, tokens, planned = tuple(present), [sum(present)] * depth, []
    for stage in {stage.layer: stage for stage in stages}.values():
        there = tuple(min(k, n) for k, n in zip(stage.keep, there, strict=True))
        tokens[stage.layer :] = [sum(there)] * (depth - stage.layer)
        planned.append(Stage(stage.layer, stage.rule, there, stage.positions))
    return LayerSchedule(tuple(planned), tuple(tokens))
