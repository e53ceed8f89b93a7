"""Pruning inside the language model: at which layer visual tokens leave the sequence, and by which rule.

A *stage* is a layer, a rule and a budget. What a rule may look at is measured at that layer by
`gridprune_cli.vlm.inner`; the rule itself is pure. A rule that a method needs stands in the method's file, and in the
method's `rules`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import View


@dataclass(frozen=True)
class LayerSignals:
    """What a rule may look at: the visual tokens of one image, or of several that share a budget, at a layer's input.

    Of the prompt's N visual tokens n are still there.

    tokens         (n,) int64, ascending: which of the N they are
    within         (n,) bool: whether inside the contextual region; false everywhere where there is no region
    views          those of all images of the prompt, whose N tokens are numbered view by view
    saliency       (n,) how much the vision tower attends to each
    attention      (n,) float64, CPU: attention of the prompt's last token, or of its raters, to each token; softmax
                   over all that is still in the sequence, mean over heads; None where the rule asks for no attention
    hidden_states  (n, D), None where the rule does not ask for them
    keys           (n, C), None where the rule does not ask for them
    values         (n, C), the same
    rotary         (n, 2), mean cosine and mean sine of the position embeddings over the numbers of a head, the same
    text_hidden_states, text_keys, text_values  (m, D), (m, C), (m, C): those of the prompt's text behind its last
                   image; m may be 0
    """

    tokens: Tensor
    within: Tensor
    views: tuple[View, ...] = ()
    attention: Tensor | None = None
    hidden_states: Tensor | None = None
    keys: Tensor | None = None
    text_hidden_states: Tensor | None = None
    text_keys: Tensor | None = None
    saliency: Tensor | None = None
    values: Tensor | None = None
    text_values: Tensor | None = None
    rotary: Tensor | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """Which tokens stay at a stage. Fields are options.

    attention      in which layer attention is measured: -1 the layer before the stage, 0 the stage's own, None: in none
    rated          whether attention is that of those text tokens that `raters` names, not the last token's
    queries        how the attention of several raters is combined: their "mean", or the "max" of them, which is
                   measured in the stage's own layer only, and divided by their number
    hidden_states  whether the rule looks at hidden states, after the norm that ends the language model
    keys           which keys it looks at, all heads side by side: -1 those of the layer before, with their position
                   embeddings, 0 what the stage's own layer projects, without them, None: none
    values         whether it looks at the values that the stage's own layer projects
    rotary         whether it looks at the position embeddings of that layer
    """

    name: ClassVar[str]
    attention: ClassVar[int | None] = None
    rated: ClassVar[bool] = False
    queries: ClassVar[Literal["mean", "max"]] = "mean"
    hidden_states: ClassVar[bool] = False
    keys: ClassVar[int | None] = None
    values: ClassVar[bool] = False
    rotary: ClassVar[bool] = False

    @abstractmethod
    def select(self, signals: LayerSignals, k: int) -> Tensor:
        """The k of the n tokens that stay: sorted indices among the n, (k,) int64, for 0 <= k <= n."""

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """(m,) bool: the text tokens whose attention counts, for a rule that is `rated`.

        text (m, D) are the tokens behind the last image and visual (N, D) the visual tokens, as the first layer gets
        them. Where the rule names no token, the attention of the prompt's last token is taken.
        """
        raise NotImplementedError(f"{type(self).__name__} is rated, and names no raters")


@dataclass(frozen=True)
class Attention(Rule):
    """The highest attention of the layer before: FastV (arXiv 2403.06764)."""

    name: ClassVar[str] = "attention"
    attention: ClassVar[int | None] = -1

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.attention is not None
        return top(signals.attention, k)


@dataclass(frozen=True)
class StageAttention(Attention):
    """The highest attention of the stage's own layer, measured ahead of it: PyramidDrop (arXiv 2410.17247)."""

    name: ClassVar[str] = "stage-attention"
    attention: ClassVar[int | None] = 0


@dataclass(frozen=True)
class Region(Rule):
    """Exactly what is inside the contextual region: CROP's inner pruning (arXiv 2505.21233). k must be its count."""

    name: ClassVar[str] = "region"

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        return signals.within.nonzero()[:, 0]


@dataclass(frozen=True)
class RegionAttention(Rule):
    """What is inside the region first, then what is outside, each by the highest attention of the layer before.

    After CROP. A budget, and what happens where the region has another number of tokens, are in nothing that was read
    of it: ours.
    """

    name: ClassVar[str] = "region-attention"
    attention: ClassVar[int | None] = -1

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.attention is not None
        return top(signals.attention + 2 * signals.within, k)  # attention is at most 1


@dataclass(frozen=True)
class Selection(Rule):
    """What a method selected ahead of the language model, from signals that need none of its layers. Ours.

    tokens  (K,) which of the prompt's N visual tokens these are, ascending; k must be how many of them are there
    """

    name: ClassVar[str] = "selection"
    tokens: tuple[int, ...] = ()

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        return torch.isin(signals.tokens, torch.tensor(self.tokens, dtype=torch.int64)).nonzero()[:, 0]


@dataclass(frozen=True)
class Stage:
    """At the input of a layer, counted from 0, all but the budgets of the visual tokens leave.

    budgets    how many stay of each image, or of all together where it holds one number only
    positions  "original": what stays keeps its positions; "compact": it is numbered on from 0 from this layer on
    """

    layer: int
    rule: Rule
    budgets: tuple[int, ...]
    positions: str = "original"

    def to_json(self) -> dict[str, Any]:
        options = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.rule).items()
        }
        rule = {"name": self.rule.name, **options}
        return {"layer": self.layer, "rule": rule, "keep": list(self.budgets), "positions": self.positions}

    @classmethod
    def from_json(cls, fields: dict[str, Any], rules: Mapping[str, type[Rule]]) -> "Stage":
        """The inverse of `to_json`, with rules by their names. Raises KeyError or TypeError for what is no stage."""
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields["rule"].items()
        }
        rule = rules[options.pop("name")](**options)
        return cls(fields["layer"], rule, tuple(fields["keep"]), fields["positions"])


@dataclass(frozen=True)
class LayerSchedule:
    """All stages of a prompt, in the order of their layers, and what they come to.

    tokens  visual tokens in each layer of the language model
    """

    stages: tuple[Stage, ...]
    tokens: tuple[int, ...]

    @property
    def selection(self) -> tuple[int, ...] | None:
        """The visual tokens that stay, where a rule lists them; None where they are known only when the model runs."""
        listed = [stage.rule.tokens for stage in self.stages if isinstance(stage.rule, Selection)]
        return listed[-1] if listed else None

    def to_json(self) -> dict[str, Any]:
        mean = round(sum(self.tokens) / len(self.tokens), 2)
        return {"stages": [stage.to_json() for stage in self.stages], "tokens": list(self.tokens), "mean": mean}

    @classmethod
    def from_json(cls, fields: dict[str, Any], rules: Mapping[str, type[Rule]]) -> "LayerSchedule":
        """The inverse of `to_json`. Raises as `Stage.from_json`."""
        return cls(tuple(Stage.from_json(stage, rules) for stage in fields["stages"]), tuple(fields["tokens"]))

    def __str__(self) -> str:
        return ", ".join(f"{sum(stage.budgets)} from layer {stage.layer} on" for stage in self.stages)


def plan(stages: Sequence[Stage], present: Sequence[int], depth: int) -> LayerSchedule:
    """The schedule of stages, their budgets cut to the tokens that are still there.

    `present` are the tokens that the language model receives, per image or in all, as each stage's budgets are; `depth`
    is its number of layers. Layers ascend and are below `depth`; of stages at the same layer the last one counts.
    """
    left, tokens, planned = tuple(present), [sum(present)] * depth, []
    for stage in {stage.layer: stage for stage in stages}.values():
        left = tuple(min(k, n) for k, n in zip(stage.budgets, left, strict=True))
        tokens[stage.layer :] = [sum(left)] * (depth - stage.layer)
        planned.append(Stage(stage.layer, stage.rule, left, stage.positions))
    return LayerSchedule(tuple(planned), tuple(tokens))
