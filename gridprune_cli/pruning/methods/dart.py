"""DART (arXiv 2502.11494): tokens that duplicate a few pivots least, inside the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.pruning.similarity import cosines


@dataclass(frozen=True)
class Duplication(Rule):
    """Visual pivots, and the tokens that are least like each of them and of the text's pivots.

    Pivots are the tokens with the largest sum of |key|, visual_pivots of the visual ones and text_pivots of the text.
    In turn, the visual ones first and each kind by its sum, a pivot p takes the visual tokens i, not yet taken, with
    the lowest cos(h_p, h_i); h are hidden states. k counts the visual pivots; the pivots share the rest, the first ones
    one token more where it can't be shared alike.
    """

    name: ClassVar[str] = "duplication"
    hidden_states: ClassVar[bool] = True
    keys: ClassVar[int | None] = -1
    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        for option, least in (("visual_pivots", 1), ("text_pivots", 0)):
            if getattr(self, option) < least:
                raise ValueError(f"{option} must be at least {least}, not {getattr(self, option)}")

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.keys is not None and signals.hidden_states is not None
        assert signals.text_keys is not None and signals.text_hidden_states is not None
        visual = _largest(signals.keys, min(self.visual_pivots, k))
        text = _largest(signals.text_keys, min(self.text_pivots, len(signals.text_keys)))
        stays = torch.zeros(len(signals.tokens), dtype=torch.bool)
        stays[visual] = True
        pivots = torch.cat([signals.hidden_states[visual], signals.text_hidden_states[text]])
        quota, longer = divmod(k - len(visual), max(1, len(pivots)))
        for number, similarity in enumerate(cosines(pivots, signals.hidden_states)):
            least_similar = similarity.masked_fill(stays, torch.inf).argsort(stable=True)
            stays[least_similar[: quota + (number < longer)]] = True
        return stays.nonzero()[:, 0]


def _largest(keys: Tensor, count: int) -> Tensor:
    """(count,) indices of the keys (n, C) with the largest sum of |key|, the largest first."""
    lengths = torch.linalg.vector_norm(keys.float(), 1, dim=1).cpu()
    return lengths.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class Dart(InnerMethod):
    """From layer `layer` on, a few pivots and what is least like them, K tokens in all, by `Duplication`.

    Keys and hidden states are those that the layer before gave: keys with their position embeddings, hidden states
    normed as behind the last layer. What stays keeps its positions. All this is as in the published code.

    Departures: exactly K stay. The published code keeps its visual pivots beside what it counts, and rounds down what
    each pivot takes: its 128 are 4 + 8 * 16, K = 132 here. Its order of pivots is that of a Python set, so that a few
    other tokens stay there.
    """

    name: ClassVar[str] = "dart"
    rules: ClassVar[tuple[type[Rule], ...]] = (Duplication,)
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}")
        self._rule()

    def _rule(self) -> Duplication:
        return Duplication(self.visual_pivots, self.text_pivots)

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        return (Stage(self.layer, self._rule(), tuple(budgets)),)
