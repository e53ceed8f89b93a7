"""Top K by saliency: FasterVLM (arXiv 2412.01818), where saliency is the attention of CLS."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class TopK(Method):
    """The K tokens of the highest saliency; the question has no say."""

    name: ClassVar[str] = "topk"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency"})

    def _pick(self, signals: Signals, k: int) -> Tensor:
        return top(values(signals, "saliency"), k)
