"""FasterVLM (arXiv 2412.01818): the top K by saliency, where saliency is the attention of CLS."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class FasterVLM(Method):
    """The K tokens of the highest saliency; the question has no say.

    Departure: the tokens of all views compete for one K; the published code gives each tile the same.
    """

    name: ClassVar[str] = "fastervlm"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency"})

    def score(self, signals: Signals) -> Tensor:
        return values(signals, "saliency")
